"""Stand-in for the Slicer application: slicer-core's MRML, PySide6's Qt, and own stand-ins for what neither has."""

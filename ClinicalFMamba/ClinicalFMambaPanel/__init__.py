"""What is behind the ClinicalFMamba panel: logic, worker client, nodes, set-up. Slicer's naming style throughout."""

from .library import addLibraryToPath

addLibraryToPath()

"""A signal in plain Python: custom Qt signals crash PythonQt."""

import logging


class Signal:
    """Calls what is connected to it, in order; what one of them raises is logged and does not stop the others."""

    def __init__(self, name=""):
        self._name = name
        self._slots = []

    def connect(self, slot):
        if slot not in self._slots:
            self._slots.append(slot)

    def disconnect(self, slot):
        if slot in self._slots:
            self._slots.remove(slot)

    def disconnectAll(self):
        self._slots.clear()

    def emit(self, *args):
        for slot in list(self._slots):
            try:
                slot(*args)
            except Exception:
                logging.exception(f"ClinicalFMamba: a receiver of {self._name or 'a signal'} failed")

"""The module `ctk`: stand-ins with the properties, public slots and signals of CTK's headers, and nothing else.

What CTK declares as a plain C++ method (neither property, slot nor Q_INVOKABLE) Python cannot reach in Slicer, so that
it is left out on purpose: ctkSliderWidget.setRange, ctkCollapsibleButton.setCollapsed and many more.
"""

import os
import re
import sys
import types
import weakref

from PySide6 import QtCore, QtGui, QtWidgets
from shiboken6 import Shiboken

from .pythonqt import HostSignal, QUiLoader, call, connect, emit, make_native, python_value

_classes = {}


def stand_in(cls):
    """Register a stand-in: PythonQt's attributes, and known to QUiLoader."""
    make_native(cls)
    QUiLoader.custom[cls.__name__] = cls
    _classes[cls.__name__] = cls
    return cls


def only_parent(cls, args):
    """PythonQt wraps the constructor that takes a parent; every other argument is refused."""
    if len(args) > 1 or (args and args[0] is not None and QtWidgets.QWidget not in type(args[0]).__mro__):
        raise ValueError(f"Called {cls}() with wrong arguments: {args}; a parent widget is all that it takes")
    return args[0] if args else None


def stored(kind, name, after=None):
    """A Qt property kept in the widget's state; `after(widget)` runs where the value changed."""

    def get(self):
        return python_value(getattr(self._d, name))

    def set_(self, value):
        if value != getattr(self._d, name):
            setattr(self._d, name, value)
            if after is not None:
                after(self)

    return QtCore.Property(kind, get, set_)


def forwarded(kind, part, name, setter=None):
    """A Qt property of an inner widget."""
    setter = setter or "set" + name[0].upper() + name[1:]

    def get(self):
        return getattr(getattr(self._d, part), name)

    def set_(self, value):
        getattr(getattr(self._d, part), setter)(value)

    return QtCore.Property(kind, get, set_)


def state(widget, /, **values):
    widget._d = types.SimpleNamespace(**values)
    return widget._d


def wire(part, signal, widget, name):
    """Connect a signal of an inner widget to a method. Held weakly: the widget ends with its last Python reference."""
    reference = weakref.ref(widget)

    def slot(*args):
        living = reference()
        if living is not None and Shiboken.isValid(living):
            call(getattr(living, name), args)

    connect(part, signal, slot)


def inner(widget, margin=0):
    layout = QtWidgets.QHBoxLayout(widget)
    layout.setContentsMargins(margin, margin, margin, margin)
    return layout


# --------------------------------------------------------------------------------


@stand_in
class ctkCollapsibleButton(QtWidgets.QAbstractButton):
    contentsCollapsed = HostSignal("contentsCollapsed(bool)")

    def __init__(self, *args):
        super().__init__(only_parent("ctkCollapsibleButton", args))
        state(
            self,
            collapsed=False,
            collapsedHeight=14,
            flat=False,
            hidden=[],
            maximumHeight=self.maximumHeight,
            contentsFrameShape=0,
            contentsFrameShadow=16,
            contentsLineWidth=1,
            contentsMidLineWidth=0,
            buttonTextAlignment=0x81,
            indicatorAlignment=0x81,
        )
        self.setCheckable(True)
        self.setChecked(True)
        self.setSizePolicy(QtWidgets.QSizePolicy.Policy.Minimum, QtWidgets.QSizePolicy.Policy.Preferred)
        self.setContentsMargins(0, self._header(), 0, 0)
        wire(self, "toggled(bool)", self, "_collapse")

    def _header(self):
        return self.fontMetrics().height() + 10

    def _set_collapsed(self, value):
        self.setChecked(not value) if self.isCheckable() else self._collapse_to(value)

    collapsed = QtCore.Property(bool, lambda self: self._d.collapsed, _set_collapsed)
    collapsedHeight = stored(int, "collapsedHeight", lambda self: self.updateGeometry())
    flat = stored(bool, "flat", lambda self: self.update())
    contentsFrameShape = stored(int, "contentsFrameShape", lambda self: self.update())
    contentsFrameShadow = stored(int, "contentsFrameShadow", lambda self: self.update())
    contentsLineWidth = stored(int, "contentsLineWidth", lambda self: self.update())
    contentsMidLineWidth = stored(int, "contentsMidLineWidth", lambda self: self.update())
    buttonTextAlignment = stored(int, "buttonTextAlignment", lambda self: self.update())
    indicatorAlignment = stored(int, "indicatorAlignment", lambda self: self.update())

    def _collapse(self, checked):
        self._collapse_to(not checked)

    def _collapse_to(self, collapsed):
        d = self._d
        if collapsed == d.collapsed:
            return
        d.collapsed = collapsed
        if collapsed:
            d.maximumHeight = self.maximumHeight
            d.hidden = [w for w in self.children() if w.isWidgetType() and not w.isHidden()]
            for w in d.hidden:
                w.hide()
            self.setMaximumHeight(self._header())
        else:
            self.setMaximumHeight(d.maximumHeight)
            for w in d.hidden:
                w.show()
            d.hidden = []
        self.updateGeometry()
        emit(self, "contentsCollapsed(bool)", collapsed)

    def minimumSizeHint(self):
        return self._hint(QtWidgets.QWidget.minimumSizeHint(self))

    def sizeHint(self):
        return self._hint(QtWidgets.QWidget.sizeHint(self))

    def _hint(self, contents):
        width = self.fontMetrics().horizontalAdvance(self.text) + 40
        if self._d.collapsed:
            return QtCore.QSize(width, self._header())
        return contents.expandedTo(QtCore.QSize(width, self._header()))

    def hitButton(self, pos):
        return pos.y() <= self._header()

    def paintEvent(self, event):
        painter = QtGui.QPainter(self)
        header = QtCore.QRect(0, 0, self.width, self._header())
        if not self._d.flat:
            painter.setRenderHint(QtGui.QPainter.RenderHint.Antialiasing)
            painter.setPen(QtCore.Qt.PenStyle.NoPen)
            painter.setBrush(self.palette.color(QtGui.QPalette.ColorRole.Midlight))
            painter.drawRoundedRect(header, 3, 3)
        option = QtWidgets.QStyleOption()
        option.initFrom(self)
        option.rect = QtCore.QRect(6, (header.height() - 12) // 2, 12, 12)
        arrow = QtWidgets.QStyle.PrimitiveElement
        element = arrow.PE_IndicatorArrowRight if self._d.collapsed else arrow.PE_IndicatorArrowDown
        self.style().drawPrimitive(element, option, painter, self)
        painter.setPen(self.palette.color(QtGui.QPalette.ColorRole.ButtonText))
        painter.drawText(header.adjusted(24, 0, -4, 0), 0x81 | 0x800, self.text)
        painter.end()


@stand_in
class ctkCollapsibleGroupBox(QtWidgets.QGroupBox):
    def __init__(self, *args):
        super().__init__(only_parent("ctkCollapsibleGroupBox", args))
        state(self, collapsedHeight=14, hidden=[], maximumHeight=self.maximumHeight)
        self.setCheckable(True)
        self.setChecked(True)
        wire(self, "toggled(bool)", self, "_expand")

    collapsed = QtCore.Property(bool, lambda self: not self.isChecked(), lambda self, v: self.setChecked(not v))
    collapsedHeight = stored(int, "collapsedHeight")

    def _expand(self, expand):
        d = self._d
        if expand:
            for w in d.hidden:
                w.show()
            d.hidden = []
            self.setMaximumHeight(d.maximumHeight)
        else:
            d.maximumHeight = self.maximumHeight
            d.hidden = [w for w in self.children() if w.isWidgetType() and not w.isHidden()]
            for w in d.hidden:
                w.hide()
            self.setMaximumHeight(self.fontMetrics().height() + 8)


@stand_in
class ctkSliderWidget(QtWidgets.QWidget):
    valueChanged = HostSignal("valueChanged(double)")
    valueIsChanging = HostSignal("valueIsChanging(double)")
    decimalsChanged = HostSignal("decimalsChanged(int)")

    NoSynchronize, SynchronizeWidth, SynchronizeDecimals = 0, 1, 2

    def __init__(self, *args):
        super().__init__(only_parent(type(self).__name__, args))
        slider = QtWidgets.QSlider(QtCore.Qt.Orientation.Horizontal)
        spin = QtWidgets.QDoubleSpinBox()
        d = state(self, slider=slider, spin=spin, value=0.0, tracking=True, down=False, silent=False)
        d.tickInterval, d.tickPosition, d.synchronizeSiblings, d.popupSlider = 0.0, 0, 3, False
        d.pageStep, d.invertedAppearance, d.invertedControls = 10.0, False, False
        layout = inner(self)
        layout.addWidget(slider)
        layout.addWidget(spin)
        slider.setRange(0, 10000)
        spin.setRange(0, 99)
        wire(spin, "valueChanged(double)", self, "_spin_changed")
        wire(slider, "sliderMoved(int)", self, "_slider_moved")
        wire(slider, "sliderPressed()", self, "_press")
        wire(slider, "sliderReleased()", self, "_release")

    def _slider_moved(self, position):
        low, high = self._d.spin.minimum, self._d.spin.maximum
        self._d.spin.setValue(low + (high - low) * position / 10000)

    def _press(self):
        self._d.down, self._d.before = True, self._d.value

    def _release(self):
        self._d.down = False
        if not self._d.tracking and self._d.value != self._d.before:
            emit(self, "valueChanged(double)", self._d.value)

    def _spin_changed(self, value):
        d = self._d
        d.value = value
        self._show()
        if not d.tracking:
            emit(self, "valueIsChanging(double)", value)
        if d.tracking or not d.down:
            emit(self, "valueChanged(double)", value)

    def _show(self):
        d = self._d
        span = d.spin.maximum - d.spin.minimum
        if not d.slider.isSliderDown():
            share = (d.spin.value - d.spin.minimum) / span if 0 < span < float("inf") else 0
            d.slider.setValue(round(10000 * share))

    def _set_minimum(self, value):
        self._d.spin.setMinimum(value)
        self._show()

    def _set_maximum(self, value):
        self._d.spin.setMaximum(value)
        self._show()

    def setValue(self, value):
        down, self._d.down = self._d.down, False
        self._d.spin.setValue(value)
        self._d.down = down

    def setDecimals(self, decimals):
        self._d.spin.setDecimals(decimals)
        self._show()
        emit(self, "decimalsChanged(int)", self._d.spin.decimals)

    def setSpinBoxVisible(self, visible):
        self._d.spin.setVisible(visible)

    def reset(self):
        self.setValue(0.0)

    value = QtCore.Property(float, lambda self: self._d.spin.value, setValue)
    minimum = QtCore.Property(float, lambda self: self._d.spin.minimum, _set_minimum)
    maximum = QtCore.Property(float, lambda self: self._d.spin.maximum, _set_maximum)
    decimals = QtCore.Property(int, lambda self: self._d.spin.decimals, setDecimals)
    spinBoxVisible = QtCore.Property(bool, lambda self: not self._d.spin.isHidden(), setSpinBoxVisible)
    singleStep = forwarded(float, "spin", "singleStep")
    prefix = forwarded(str, "spin", "prefix")
    suffix = forwarded(str, "spin", "suffix")
    spinBoxAlignment = forwarded(int, "spin", "alignment")
    pageStep = stored(float, "pageStep")
    tickInterval = stored(float, "tickInterval")
    tickPosition = stored(int, "tickPosition")
    synchronizeSiblings = stored(int, "synchronizeSiblings")
    tracking = stored(bool, "tracking")
    popupSlider = stored(bool, "popupSlider")
    invertedAppearance = stored(bool, "invertedAppearance")
    invertedControls = stored(bool, "invertedControls")


@stand_in
class ctkDoubleSlider(QtWidgets.QWidget):
    valueChanged = HostSignal("valueChanged(double)")
    sliderMoved = HostSignal("sliderMoved(double)")
    sliderPressed = HostSignal("sliderPressed()")
    sliderReleased = HostSignal("sliderReleased()")
    rangeChanged = HostSignal("rangeChanged(double,double)")

    def __init__(self, *args):
        super().__init__(only_parent("ctkDoubleSlider", args))
        slider = QtWidgets.QSlider(QtCore.Qt.Orientation.Horizontal)
        d = state(self, slider=slider, value=0.0, minimum=0.0, maximum=99.0, singleStep=1.0, pageStep=10.0)
        d.tickInterval, d.tickPosition, d.tracking = 0.0, 0, True
        d.handleToolTip, d.invertedAppearance, d.invertedControls = "", False, False
        inner(self).addWidget(slider)
        slider.setRange(0, 10000)
        wire(slider, "sliderMoved(int)", self, "_moved")
        wire(slider, "sliderPressed()", self, "sliderPressed")
        wire(slider, "sliderReleased()", self, "sliderReleased")

    def _moved(self, position):
        d = self._d
        value = d.minimum + (d.maximum - d.minimum) * position / 10000
        emit(self, "sliderMoved(double)", value)
        self.setValue(value)

    def setValue(self, value):
        d = self._d
        value = min(max(value, d.minimum), d.maximum)
        if value != d.value:
            d.value = value
            self._show()
            emit(self, "valueChanged(double)", value)

    def _show(self):
        d = self._d
        span = d.maximum - d.minimum
        if not d.slider.isSliderDown():
            d.slider.setValue(round(10000 * (d.value - d.minimum) / span) if span > 0 else 0)

    def _limits(self):
        d = self._d
        emit(self, "rangeChanged(double,double)", d.minimum, d.maximum)
        self.setValue(d.value)
        self._show()

    def setOrientation(self, orientation):
        self._d.slider.setOrientation(QtCore.Qt.Orientation(orientation))

    value = QtCore.Property(float, lambda self: self._d.value, setValue)
    sliderPosition = QtCore.Property(float, lambda self: self._d.value, setValue)
    orientation = QtCore.Property(int, lambda self: int(self._d.slider.orientation), setOrientation)
    minimum = stored(float, "minimum", _limits)
    maximum = stored(float, "maximum", _limits)
    singleStep = stored(float, "singleStep")
    pageStep = stored(float, "pageStep")
    tickInterval = stored(float, "tickInterval")
    tickPosition = stored(int, "tickPosition")
    tracking = stored(bool, "tracking")
    handleToolTip = stored(str, "handleToolTip")
    invertedAppearance = stored(bool, "invertedAppearance")
    invertedControls = stored(bool, "invertedControls")


@stand_in
class ctkDoubleSpinBox(QtWidgets.QWidget):
    valueChanged = HostSignal("valueChanged(double)", "valueChanged(QString)")
    editingFinished = HostSignal("editingFinished()")
    decimalsChanged = HostSignal("decimalsChanged(int)")

    def __init__(self, *args):
        super().__init__(only_parent(type(self).__name__, args))
        spin = QtWidgets.QDoubleSpinBox()
        d = state(self, spin=spin)
        d.decimalsOption, d.setMode, d.invertedControls, d.sizeHintPolicy = 0, 1, False, 0
        inner(self).addWidget(spin)
        wire(spin, "valueChanged(double)", self, "_changed")
        wire(spin, "editingFinished()", self, "editingFinished")

    def _changed(self, value):
        emit(self, "valueChanged(double)", value)
        emit(self, "valueChanged(QString)", self._d.spin.text)

    def setValue(self, value):
        self._d.spin.setValue(value)

    def setValueIfDifferent(self, value):
        self._d.spin.setValue(value)

    def setValueAlways(self, value):
        if value == self._d.spin.value:
            self._changed(value)
        self._d.spin.setValue(value)

    def stepUp(self):
        self._d.spin.stepUp()

    def stepDown(self):
        self._d.spin.stepDown()

    def setDecimals(self, decimals):
        self._d.spin.setDecimals(decimals)
        emit(self, "decimalsChanged(int)", decimals)

    def setReadOnly(self, on):
        self._d.spin.setReadOnly(on)

    value = QtCore.Property(float, lambda self: self._d.spin.value, setValue)
    decimals = QtCore.Property(int, lambda self: self._d.spin.decimals, setDecimals)
    readOnly = forwarded(bool, "spin", "readOnly")
    minimum = forwarded(float, "spin", "minimum")
    maximum = forwarded(float, "spin", "maximum")
    singleStep = forwarded(float, "spin", "singleStep")
    prefix = forwarded(str, "spin", "prefix")
    suffix = forwarded(str, "spin", "suffix")
    frame = forwarded(bool, "spin", "frame")
    alignment = forwarded(int, "spin", "alignment")
    cleanText = QtCore.Property(str, lambda self: self._d.spin.cleanText)
    decimalsOption = stored(int, "decimalsOption")
    setMode = stored(int, "setMode")
    invertedControls = stored(bool, "invertedControls")
    sizeHintPolicy = stored(int, "sizeHintPolicy")
    isSettingValue = QtCore.Property(bool, lambda self: False)


class _RangeBar(QtWidgets.QWidget):
    """The two-handled slider of ctkRangeWidget, drawn only."""

    def __init__(self, owner):
        super().__init__(owner)
        self.owner = owner
        self.setMinimumSize(60, 18)
        self.setSizePolicy(QtWidgets.QSizePolicy.Policy.Expanding, QtWidgets.QSizePolicy.Policy.Fixed)

    def paintEvent(self, event):
        d = self.owner._d
        span = (d.maximum - d.minimum) or 1.0
        painter = QtGui.QPainter(self)
        painter.setRenderHint(QtGui.QPainter.RenderHint.Antialiasing)
        painter.setPen(QtCore.Qt.PenStyle.NoPen)
        width, middle = self.width - 10, self.height // 2
        low, high = (5 + width * (v - d.minimum) / span for v in (d.low, d.high))
        painter.setBrush(self.palette.color(QtGui.QPalette.ColorRole.Mid))
        painter.drawRoundedRect(QtCore.QRectF(5, middle - 2, width, 4), 2, 2)
        painter.setBrush(self.palette.color(QtGui.QPalette.ColorRole.Highlight))
        painter.drawRect(QtCore.QRectF(low, middle - 2, high - low, 4))
        painter.setBrush(self.palette.color(QtGui.QPalette.ColorRole.Button))
        painter.setPen(self.palette.color(QtGui.QPalette.ColorRole.Dark))
        for x in (low, high):
            painter.drawRoundedRect(QtCore.QRectF(x - 4, middle - 7, 8, 14), 2, 2)
        painter.end()


@stand_in
class ctkRangeWidget(QtWidgets.QWidget):
    minimumValueChanged = HostSignal("minimumValueChanged(double)")
    minimumValueIsChanging = HostSignal("minimumValueIsChanging(double)")
    maximumValueChanged = HostSignal("maximumValueChanged(double)")
    maximumValueIsChanging = HostSignal("maximumValueIsChanging(double)")
    valuesChanged = HostSignal("valuesChanged(double,double)")
    rangeChanged = HostSignal("rangeChanged(double,double)")

    def __init__(self, *args):
        super().__init__(only_parent(type(self).__name__, args))
        lowSpin, highSpin = QtWidgets.QDoubleSpinBox(), QtWidgets.QDoubleSpinBox()
        d = state(self, lowSpin=lowSpin, highSpin=highSpin, minimum=0.0, maximum=99.0, low=0.0, high=99.0)
        d.tracking, d.symmetricMoves, d.autoSpinBoxWidth, d.tickInterval = True, False, True, 0.0
        d.spinBoxAlignment, d.spinBoxTextAlignment = 0x80, 2
        d.bar = _RangeBar(self)
        layout = inner(self)
        for w in (lowSpin, d.bar, highSpin):
            layout.addWidget(w)
        self._show()
        wire(lowSpin, "valueChanged(double)", self, "setMinimumValue")
        wire(highSpin, "valueChanged(double)", self, "setMaximumValue")

    def _show(self):
        d = self._d
        for spin, value in ((d.lowSpin, d.low), (d.highSpin, d.high)):
            was = spin.blockSignals(True)
            spin.setRange(d.minimum, d.maximum)
            spin.setValue(value)
            spin.blockSignals(was)
        d.bar.update()

    def _round(self, value):
        return round(value, self._d.lowSpin.decimals)

    def setValues(self, low, high):
        d = self._d
        low, high = sorted((low, high))
        low, high = (self._round(min(max(v, d.minimum), d.maximum)) for v in (low, high))
        lowMoved, highMoved = low != d.low, high != d.high
        d.low, d.high = low, high
        self._show()
        if lowMoved or highMoved:
            emit(self, "valuesChanged(double,double)", low, high)
        if lowMoved:
            emit(self, "minimumValueChanged(double)", low)
        if highMoved:
            emit(self, "maximumValueChanged(double)", high)

    def setMinimumValue(self, value):
        self.setValues(value, max(value, self._d.high))

    def setMaximumValue(self, value):
        self.setValues(min(value, self._d.low), value)

    def setRange(self, minimum, maximum):
        d = self._d
        before = d.minimum, d.maximum
        d.minimum, d.maximum = sorted((self._round(minimum), self._round(maximum)))
        if before != (d.minimum, d.maximum):
            emit(self, "rangeChanged(double,double)", d.minimum, d.maximum)
        self.setValues(d.low, d.high)

    def setDecimals(self, decimals):
        self._d.lowSpin.setDecimals(decimals)
        self._d.highSpin.setDecimals(decimals)
        self._show()

    def reset(self):
        self.setValues(self._d.minimum, self._d.maximum)

    def _set_minimum(self, value):
        self.setRange(value, max(value, self._d.maximum))

    def _set_maximum(self, value):
        self.setRange(min(value, self._d.minimum), value)

    def _both(name, kind=str):
        setter = "set" + name[0].upper() + name[1:]

        def set_(self, value):
            for spin in (self._d.lowSpin, self._d.highSpin):
                getattr(spin, setter)(value)

        return QtCore.Property(kind, lambda self: getattr(self._d.lowSpin, name), set_)

    minimum = QtCore.Property(float, lambda self: self._d.minimum, _set_minimum)
    maximum = QtCore.Property(float, lambda self: self._d.maximum, _set_maximum)
    minimumValue = QtCore.Property(float, lambda self: self._d.low, setMinimumValue)
    maximumValue = QtCore.Property(float, lambda self: self._d.high, setMaximumValue)
    decimals = QtCore.Property(int, lambda self: self._d.lowSpin.decimals, setDecimals)
    singleStep = _both("singleStep", float)
    prefix = _both("prefix")
    suffix = _both("suffix")
    del _both
    tickInterval = stored(float, "tickInterval")
    autoSpinBoxWidth = stored(bool, "autoSpinBoxWidth")
    spinBoxAlignment = stored(int, "spinBoxAlignment")
    spinBoxTextAlignment = stored(int, "spinBoxTextAlignment")
    tracking = stored(bool, "tracking")
    symmetricMoves = stored(bool, "symmetricMoves")


@stand_in
class ctkPathLineEdit(QtWidgets.QWidget):
    validInputChanged = HostSignal("validInputChanged(bool)")
    currentPathChanged = HostSignal("currentPathChanged(QString)")

    Dirs, Files, Drives, NoSymLinks, AllEntries, TypeMask = 0x1, 0x2, 0x4, 0x8, 0x7, 0xF
    Readable, Writable, Executable, PermissionMask = 0x10, 0x20, 0x40, 0x70
    Modified, Hidden, System, AccessMask = 0x80, 0x100, 0x200, 0x3F0
    AllDirs, CaseSensitive, NoDotAndDotDot, NoDot, NoDotDot, NoFilter = 0x400, 0x800, 0x1000, 0x2000, 0x4000, -1
    AdjustToContents, AdjustToContentsOnFirstShow, AdjustToMinimumContentsLength = 0, 1, 2

    def __init__(self, *args):
        super().__init__(only_parent("ctkPathLineEdit", args))
        combo, button = QtWidgets.QComboBox(), QtWidgets.QToolButton()
        d = state(self, combo=combo, button=button, label="", filters=0x6007, options=0, settingKey="", nameFilters=[])
        d.showBrowseButton, d.showHistoryButton, d.sizeAdjustPolicy, d.minimumContentsLength = True, True, 2, 0
        d.valid = False
        combo.setEditable(True)
        combo.setSizePolicy(QtWidgets.QSizePolicy.Policy.Expanding, QtWidgets.QSizePolicy.Policy.Fixed)
        combo.setMinimumContentsLength(8)
        button.setText("…")
        layout = inner(self)
        layout.addWidget(combo)
        layout.addWidget(button)
        # Before it has a name or a key, so that it shows the last path of all fields that have none.
        self.retrieveHistory()
        wire(combo.lineEdit(), "textChanged(QString)", self, "_changed")
        wire(button, "clicked()", self, "browse")

    def _acceptable(self, path):
        """ctk::nameFiltersToRegularExpression: the file need not exist, and its last letter may be missing."""
        extensions = [e for f in self._d.nameFilters for e in re.sub(r"^.*\(|\)$", "", f).split()]
        patterns = [".*" + re.escape(e.removeprefix("*")) + "?" for e in extensions if e.startswith("*.")]
        return re.fullmatch("|".join(patterns) or ".+", path) is not None

    def _changed(self, path):
        d = self._d
        before, d.valid = d.valid, self._acceptable(path)
        if d.valid:
            emit(self, "currentPathChanged(QString)", path)
        if d.valid != before:
            emit(self, "validInputChanged(bool)", d.valid)

    def setCurrentPath(self, path):
        self._d.combo.lineEdit().setText(path)

    def comboBox(self):
        return self._d.combo

    def browse(self):
        d, dialog = self._d, QtWidgets.QFileDialog
        if not d.filters & self.Files:
            path = dialog.getExistingDirectory(self, "Select a directory...", self.currentPath)
        elif d.filters & self.Writable:
            path = dialog.getSaveFileName(self, "Select a file to save", self.currentPath, ";;".join(d.nameFilters))
        else:
            path = dialog.getOpenFileName(self, "Open a file", self.currentPath, ";;".join(d.nameFilters))
        if path:
            self.setCurrentPath(path)

    def _history(self, paths=None):
        settings, key = QtCore.QSettings(), "ctkPathLineEdit/" + (self._d.settingKey or self.objectName)
        if paths is not None:
            settings.setValue(key, paths)
        stored = settings.value(key) or []
        return [stored] if isinstance(stored, str) else list(stored)

    def addCurrentPathToHistory(self):
        path = self.currentPath
        if path:
            self._history([path, *(p for p in self._history() if p != path)])
            combo = self._d.combo
            row = combo.findText(path)
            if row >= 0:
                combo.removeItem(row)
            combo.insertItem(0, path)
            combo.setCurrentIndex(0)

    def retrieveHistory(self):
        """The last paths of the settings key; the latest is the current one where there was none."""
        combo, path = self._d.combo, self.currentPath
        was = self.blockSignals(True)
        combo.clear()
        for stored_path in self._history()[:5]:
            combo.addItem(stored_path)
        if path:
            self.setCurrentPath(path)
        self.blockSignals(was)
        if not path:
            combo.setCurrentIndex(0)

    currentPath = QtCore.Property(str, lambda self: self._d.combo.currentText, setCurrentPath)
    label = stored(str, "label")
    filters = stored(int, "filters")
    options = stored(int, "options")
    settingKey = stored(str, "settingKey", lambda self: self.retrieveHistory())
    showBrowseButton = stored(bool, "showBrowseButton", lambda self: self._d.button.setVisible(self.showBrowseButton))
    showHistoryButton = stored(bool, "showHistoryButton")
    sizeAdjustPolicy = stored(int, "sizeAdjustPolicy")
    minimumContentsLength = stored(
        int, "minimumContentsLength", lambda self: self._d.combo.setMinimumContentsLength(self.minimumContentsLength)
    )
    nameFilters = stored("QStringList", "nameFilters")


@stand_in
class ctkDirectoryButton(QtWidgets.QWidget):
    directoryChanged = HostSignal("directoryChanged(QString)")
    directorySelected = HostSignal("directorySelected(QString)")

    def __init__(self, *args):
        super().__init__(only_parent("ctkDirectoryButton", args))
        state(
            self, button=QtWidgets.QPushButton("."), directory=os.getcwd(), caption="", text="", options=1, acceptMode=0
        )
        inner(self).addWidget(self._d.button)
        wire(self._d.button, "clicked()", self, "browse")

    def _set_directory(self, path):
        path = os.path.abspath(path)
        emit(self, "directorySelected(QString)", path)
        if path != self._d.directory:
            self._d.directory = path
            self._d.button.setText(self._d.text or path)
            emit(self, "directoryChanged(QString)", path)

    def browse(self):
        path = QtWidgets.QFileDialog.getExistingDirectory(self, self._d.caption, self._d.directory)
        if path:
            self._set_directory(path)
        return path

    directory = QtCore.Property(str, lambda self: self._d.directory, _set_directory)
    caption = stored(str, "caption")
    text = stored(str, "text", lambda self: self._d.button.setText(self._d.text))
    options = stored(int, "options")
    acceptMode = stored(int, "acceptMode")


@stand_in
class ctkComboBox(QtWidgets.QComboBox):
    returnRelease = HostSignal("returnRelease()")

    NeverScroll, AlwaysScroll, ScrollWithFocus, ScrollWithNoVScrollBar = range(4)

    def __init__(self, *args):
        super().__init__(only_parent("ctkComboBox", args))
        state(self, defaultText="", forceDefault=False, elideMode=3, scrollWheelEffect=1)

    def setCurrentUserDataAsString(self, data):
        self.setCurrentIndex(self.findData(data))

    def paintEvent(self, event):
        if self.currentIndex >= 0 and not self._d.forceDefault:
            super().paintEvent(event)
            return
        option = QtWidgets.QStyleOptionComboBox()
        self.initStyleOption(option)
        option.currentText = self._d.defaultText
        painter = QtWidgets.QStylePainter(self)
        painter.drawComplexControl(QtWidgets.QStyle.ComplexControl.CC_ComboBox, option)
        painter.drawControl(QtWidgets.QStyle.ControlElement.CE_ComboBoxLabel, option)
        painter.end()

    defaultText = stored(str, "defaultText", lambda self: self.update())
    forceDefault = stored(bool, "forceDefault", lambda self: self.update())
    elideMode = stored(int, "elideMode")
    scrollWheelEffect = stored(int, "scrollWheelEffect")
    currentUserDataAsString = QtCore.Property(str, lambda self: str(self.currentData or ""), setCurrentUserDataAsString)


@stand_in
class ctkCheckBox(QtWidgets.QCheckBox):
    def __init__(self, *args):
        super().__init__(only_parent("ctkCheckBox", args))


@stand_in
class ctkMessageBox(QtWidgets.QMessageBox):
    def __init__(self, *args):
        super().__init__(only_parent("ctkMessageBox", args))
        state(self, dontShowAgainVisible=False, dontShowAgainSettingsKey="", dontShowAgain=False)

    def setDontShowAgain(self, on):
        self._d.dontShowAgain = on

    def addDontShowAgainButtonRole(self, role):
        pass

    dontShowAgain = QtCore.Property(bool, lambda self: self._d.dontShowAgain, setDontShowAgain)
    dontShowAgainVisible = stored(bool, "dontShowAgainVisible")
    dontShowAgainSettingsKey = stored(str, "dontShowAgainSettingsKey")


def install():
    module = types.ModuleType("ctk", "Stand-ins for CTK's widgets")

    def missing(name):
        raise AttributeError(f"module 'ctk' of the stand-in host has no attribute '{name}'")

    vars(module).update({k: v for k, v in _classes.items() if k.startswith("ctk")})
    module.__getattr__ = missing
    sys.modules["ctk"] = module
    return module

"""The module `slicer.parameterNodeWrapper`: typed access to a vtkMRMLScriptedModuleNode, bound to widgets.

Follows Slicer's wrapper.py, serializers.py, validators.py and guiConnectors.py in what is stored, checked, raised and
signalled, for numbers, strings, booleans, paths, enumerations, nodes and FloatRange. Types that Slicer knows and this
stand-in does not (lists, dictionaries, unions, parameter packs) raise when the class is decorated.
"""

import dataclasses
import enum
import logging
import pathlib
import sys
import types
import typing
import weakref

import ctk
import qt
import slicer
import vtk

SlicerParameterNamePropertyName = "SlicerParameterName"


# --------------------------------------------------------------------------------
# Annotations


class Default:
    def __init__(self, value=None, *, generator=None):
        self._value, self._generator = value, generator

    @property
    def value(self):
        return self._generator() if self._generator else self._value


@dataclasses.dataclass
class Decimals:
    value: int


@dataclasses.dataclass
class SingleStep:
    value: float


class Validator:
    def validate(self, value):
        raise NotImplementedError


class NotNone(Validator):
    def validate(self, value):
        if value is None:
            raise ValueError("Value must not be None")


class IsInstance(Validator):
    def __init__(self, classtype):
        self.classtype = classtype

    def validate(self, value):
        if value is not None and not isinstance(value, self.classtype):
            raise TypeError(f"Value must be of type '{self.classtype}', is type '{type(value)}' value '{value}'")


class WithinRange(Validator):
    def __init__(self, minimum, maximum):
        self.minimum, self.maximum = minimum, maximum

    def validate(self, value):
        if not self.minimum <= value <= self.maximum:
            raise ValueError(f"Value must be within range [{self.minimum}, {self.maximum}], is {value}")


class Minimum(Validator):
    def __init__(self, minimum):
        self.minimum = minimum

    def validate(self, value):
        if value < self.minimum:
            raise ValueError(f"Value must be greater than {self.minimum}, is {value}")


class Maximum(Validator):
    def __init__(self, maximum):
        self.maximum = maximum

    def validate(self, value):
        if value > self.maximum:
            raise ValueError(f"Value must be less than {self.maximum}, is {value}")


class Choice(Validator):
    def __init__(self, choices):
        self.choices = choices

    def validate(self, value):
        if value not in self.choices:
            raise ValueError(f"Value is {value}, but must be in one of the following: {self.choices}")


class Exclude(Validator):
    def __init__(self, excludedValues):
        self.excludedValues = excludedValues

    def validate(self, value):
        if value in self.excludedValues:
            raise ValueError(f"Value is {value}, but must not be one of: {self.excludedValues}")


class RangeBounds(Validator):
    def __init__(self, minimum, maximum):
        self.minimum, self.maximum = minimum, maximum

    def validate(self, value):
        if not (self.minimum <= value.minimum and value.maximum <= self.maximum):
            raise ValueError(
                f"Range must be within the bound of [{self.minimum}, {self.maximum}], "
                f"is [{value.minimum}, {value.maximum}]"
            )


class FloatRange:
    """Two numbers, minimum <= maximum; a change of one that came from a parameter node is written back."""

    def __init__(self, minimum=0.0, maximum=0.0):
        self._save = None
        self.setRange(minimum, maximum)

    def setRange(self, minimum, maximum):
        if not minimum <= maximum:
            raise ValueError(f"FloatRange must have minimum <= maximum: {minimum} <= {maximum}")
        self._minimum, self._maximum = minimum, maximum
        if self._save is not None:
            self._save(self)

    minimum = property(lambda self: self._minimum, lambda self, value: self.setRange(value, self._maximum))
    maximum = property(lambda self: self._maximum, lambda self, value: self.setRange(self._minimum, value))

    def __eq__(self, other):
        return isinstance(other, FloatRange) and (self.minimum, self.maximum) == (other.minimum, other.maximum)

    __hash__ = None

    def __repr__(self):
        return f"FloatRange(minimum={self.minimum}, maximum={self.maximum})"


def splitAnnotations(possiblyAnnotatedType):
    args = typing.get_args(typing.Annotated[possiblyAnnotatedType, "stub"])
    return args[0], args[1:-1]


def unannotatedType(possiblyAnnotatedType):
    return splitAnnotations(possiblyAnnotatedType)[0]


def findFirstAnnotation(annotations, kind):
    return next((a for a in annotations if isinstance(a, kind)), None)


def _nodeClasses(datatype):
    """Node classes of a node type or of a union of node types and None; empty for anything else."""
    datatype = unannotatedType(datatype)
    members = (
        typing.get_args(datatype) if typing.get_origin(datatype) in (typing.Union, types.UnionType) else (datatype,)
    )
    members = [m for m in members if m is not type(None)]
    return members if all(isinstance(m, type) and issubclass(m, slicer.vtkMRMLNode) for m in members) else []


# --------------------------------------------------------------------------------
# Serializers


class Serializer:
    """Reads and writes one type; values are strings on the node."""

    caching = True

    def __init__(self, type_):
        self.type = type_

    def checks(self):
        return [NotNone(), IsInstance(self.type)]

    def default(self):
        return self.type()

    def isIn(self, node, name):
        return bool(node.HasParameter(name))

    def write(self, node, name, value):
        node.SetParameter(name, str(value))

    def read(self, node, name):
        return self.type(node.GetParameter(name))


class _Number(Serializer):
    def checks(self):
        return [NotNone(), IsInstance((int, float) if self.type is float else int)]

    def default(self):
        return 0


class _Bool(Serializer):
    def write(self, node, name, value):
        node.SetParameter(name, "True" if value else "False")

    def read(self, node, name):
        return node.GetParameter(name) == "True"


class _Enum(Serializer):
    def default(self):
        return next(iter(self.type))

    def write(self, node, name, value):
        node.SetParameter(name, value.name)

    def read(self, node, name):
        return self.type[node.GetParameter(name)]


class _Node(Serializer):
    def checks(self):
        return [IsInstance(tuple(_nodeClasses(self.type)))]

    def default(self):
        return None

    def write(self, node, name, value):
        # None is a value, too: the empty parameter of the same name says that there is one.
        node.SetParameter(name, "")
        node.SetNodeReferenceID(name, value.GetID() if value is not None else None)

    def read(self, node, name):
        return node.GetNodeReference(name)


class _FloatRange(Serializer):
    caching = False

    def isIn(self, node, name):
        return bool(node.HasParameter(name + "._minimum")) and bool(node.HasParameter(name + "._maximum"))

    def write(self, node, name, value):
        with slicer.util.NodeModify(node):
            node.SetParameter(name + "._minimum", str(float(value.minimum)))
            node.SetParameter(name + "._maximum", str(float(value.maximum)))

    def read(self, node, name):
        value = FloatRange(*(float(node.GetParameter(name + part)) for part in ("._minimum", "._maximum")))
        value._save = lambda changed: self.write(node, name, changed)
        return value


def _serializer(type_):
    if type_ in (int, float):
        return _Number(type_)
    if type_ is bool:
        return _Bool(type_)
    if type_ is FloatRange:
        return _FloatRange(type_)
    if type_ is str or (isinstance(type_, type) and issubclass(type_, pathlib.PurePath)):
        return Serializer(type_)
    if isinstance(type_, type) and issubclass(type_, enum.Enum):
        return _Enum(type_)
    if _nodeClasses(type_):
        return _Node(type_)
    raise Exception(f"Unable to create serializer for type: {type_}")


class _Parameter:
    """One member of a wrapper class."""

    def __init__(self, name, annotated, default):
        self.name, self.annotated = name, annotated
        type_, annotations = splitAnnotations(annotated)
        self.serializer = _serializer(type_)
        found = findFirstAnnotation(annotations, Default)
        self.default = default or found or Default(self.serializer.default())
        self.validators = self.serializer.checks() + [a for a in annotations if isinstance(a, Validator)]
        unused = [a for a in annotations if not isinstance(a, (Validator, Default))]
        if unused:
            logging.warning(f"Unused annotations: {unused}")

    def write(self, node, name, value):
        for validator in self.validators:
            validator.validate(value)
        self.serializer.write(node, name, value)


class _Value:
    """One parameter on one node, cached until the node is modified, as in Slicer."""

    def __init__(self, parameter, node, name):
        self.parameter, self.node, self.name = parameter, node, name
        if not parameter.serializer.isIn(node, name):
            parameter.write(node, name, parameter.default.value)
        self.writing = False
        self.tag = None
        if parameter.serializer.caching:
            self.value = parameter.serializer.read(node, name)
            me = weakref.ref(self)
            self.tag = node.AddObserver(vtk.vtkCommand.ModifiedEvent, lambda caller, event: me()._modified())

    def __del__(self):
        if self.tag is not None:
            self.node.RemoveObserver(self.tag)

    def _stored(self):
        if not self.parameter.serializer.isIn(self.node, self.name):
            self.parameter.write(self.node, self.name, self.parameter.default.value)
        return self.parameter.serializer.read(self.node, self.name)

    def _modified(self):
        if not self.writing:
            self.value = self._stored()

    def read(self):
        return self._stored() if self.tag is None else self.value

    def write(self, value):
        if self.tag is None:
            self.parameter.write(self.node, self.name, value)
            return
        self.writing = True
        try:
            # Observers of the node have to find the new value: it is read back before they are called.
            with slicer.util.NodeModify(self.node):
                self.parameter.write(self.node, self.name, value)
                self.value = self._stored()
        finally:
            self.writing = False


# --------------------------------------------------------------------------------
# Widgets


class GuiConnector:
    """Binds one widget to one parameter type. Subclasses name the widget classes, the types and the signal."""

    signal = None

    def __init__(self, widget, datatype):
        self._widget = widget
        self._callback = None
        self.type, self.annotations = splitAnnotations(datatype)
        self.prepare()

    def prepare(self):
        pass

    def widget(self):
        return self._widget

    def onChanged(self, callback):
        if self.signal is None:
            return
        signal = getattr(self._widget, self.signal)
        if callback is None:
            signal.disconnect(self.changed)
        else:
            signal.connect(self.changed)
        self._callback = callback

    def changed(self):
        if self._callback:
            self._callback()

    def find(self, kind):
        return findFirstAnnotation(self.annotations, kind)


class _CheckBox(GuiConnector):
    signal = "stateChanged"

    def read(self):
        return self._widget.checked

    def write(self, value):
        self._widget.checked = value


class _PushButton(_CheckBox):
    signal = "toggled"

    def prepare(self):
        self._widget.checkable = True


class _Numbers(GuiConnector):
    signal = "valueChanged"
    low, high = float("-inf"), float("inf")

    def prepare(self):
        w = self._widget
        decimals, step = self.find(Decimals), self.find(SingleStep)
        if self.type is int and type(w) not in (qt.QSlider, qt.QSpinBox, ctk.ctkDoubleSlider):
            w.decimals = 0
        elif decimals is not None:
            w.decimals = decimals.value
        if step is not None:
            w.singleStep = step.value
        within, minimum, maximum = self.find(WithinRange), self.find(Minimum), self.find(Maximum)
        low = within.minimum if within else minimum.minimum if minimum else None
        high = within.maximum if within else maximum.maximum if maximum else None
        bounded = low is not None and high is not None
        if type(w) in (qt.QSlider, ctk.ctkSliderWidget, slicer.qMRMLSliderWidget) and not bounded:
            raise RuntimeError(f"Cannot have a connection to {w.className()} where the type is unbounded.")
        w.minimum = self.low if low is None else low
        w.maximum = self.high if high is None else high

    def read(self):
        return int(self._widget.value) if self.type is int else self._widget.value

    def write(self, value):
        self._widget.value = int(value) if self.type is int else value


class _Integers(_Numbers):
    low, high = -(2**31), 2**31 - 1


class _Choices(GuiConnector):
    signal = "currentIndexChanged"

    def prepare(self):
        choice = self.find(Choice)
        if choice is None:
            raise RuntimeError("ComboBoxToStringableConnector requires the Choice annotation to be used.")
        self.values = list(choice.choices)
        self._widget.clear()
        for value in self.values:
            self._widget.addItem(str(value))

    def read(self):
        return self.values[self._widget.currentIndex]

    def write(self, value):
        if value not in self.values:
            raise ValueError(f"Unable to find value {value} in choices {self.values}")
        self._widget.currentIndex = self.values.index(value)


class _EnumChoices(_Choices):
    def prepare(self):
        label = getattr(self.type, "label", lambda member: member.name)
        self.values = list(self.type)
        saved = self.read()
        self._widget.clear()
        for value in self.values:
            self._widget.addItem(label(value))
        self.write(saved)


class _LineEdit(GuiConnector):
    signal = "textChanged"

    def read(self):
        return self._widget.text

    def write(self, value):
        if value != self._widget.text:
            self._widget.text = value


class _Label(_LineEdit):
    signal = None


class _TextEdit(GuiConnector):
    signal = "textChanged"

    def read(self):
        return self._widget.toPlainText()

    def write(self, value):
        self._widget.setPlainText(value)


class _Range(GuiConnector):
    signal = "valuesChanged"

    def prepare(self):
        decimals, step, bounds = self.find(Decimals), self.find(SingleStep), self.find(RangeBounds)
        if decimals is not None:
            self._widget.decimals = decimals.value
        if step is not None:
            self._widget.singleStep = step.value
        if bounds is None:
            raise RuntimeError("Cannot have a connection to a range widget without a RangeBounds annotation.")
        self._widget.setRange(bounds.minimum, bounds.maximum)

    def read(self):
        return FloatRange(self._widget.minimumValue, self._widget.maximumValue)

    def write(self, value):
        self._widget.setValues(value.minimum, value.maximum)


class _Path(GuiConnector):
    signal = "currentPathChanged"

    def read(self):
        return self.type(self._widget.currentPath)

    def write(self, value):
        self._widget.currentPath = str(value)


class _Directory(GuiConnector):
    signal = "directoryChanged"

    def read(self):
        return self.type(self._widget.directory)

    def write(self, value):
        self._widget.directory = str(value)


class _NodeSelector(GuiConnector):
    signal = "currentNodeChanged"

    def prepare(self):
        self._widget.nodeTypes = [c().GetClassName() for c in _nodeClasses(self.type)]

    def read(self):
        return self._widget.currentNode()

    def write(self, value):
        self._widget.setCurrentNode(value)


def _isPath(type_):
    return isinstance(type_, type) and issubclass(type_, pathlib.PurePath)


def _isEnum(type_):
    return isinstance(type_, type) and issubclass(type_, enum.Enum)


def _connectors():
    numbers = (qt.QDoubleSpinBox, ctk.ctkSliderWidget, slicer.qMRMLSliderWidget, ctk.ctkDoubleSlider)
    numbers += (ctk.ctkDoubleSpinBox, slicer.qMRMLSpinBox)
    combos = (qt.QComboBox, ctk.ctkComboBox)
    return (
        (_CheckBox, (qt.QCheckBox, ctk.ctkCheckBox), lambda t: t is bool),
        (_PushButton, (qt.QPushButton,), lambda t: t is bool),
        (_Integers, (qt.QSlider, qt.QSpinBox), lambda t: t is int),
        (_Numbers, numbers, lambda t: t in (float, int)),
        (_Choices, combos, lambda t: t in (int, float, str, bool)),
        (_EnumChoices, combos, _isEnum),
        (_LineEdit, (qt.QLineEdit,), lambda t: t is str),
        (_Label, (qt.QLabel,), lambda t: t is str),
        (_TextEdit, (qt.QTextEdit,), lambda t: t is str),
        (_Range, (ctk.ctkRangeWidget, slicer.qMRMLRangeWidget), lambda t: t is FloatRange),
        (_Path, (ctk.ctkPathLineEdit,), _isPath),
        (_Directory, (ctk.ctkDirectoryButton,), _isPath),
        (_NodeSelector, (slicer.qMRMLNodeComboBox,), lambda t: bool(_nodeClasses(t))),
    )


def createGuiConnector(widget, datatype):
    for connector, widgets, fits in _connectors():
        if type(widget) in widgets and fits(unannotatedType(datatype)):
            return connector(widget, datatype)
    raise RuntimeError(f"Unable to create GUI connector from datatype '{datatype}' to widget type '{type(widget)}'.")


# --------------------------------------------------------------------------------
# The decorator


def _check(self, name):
    if name not in self.allParameters:
        raise ValueError(f"Cannot find a param with the given name: {name}, of {list(self.allParameters)}")


def _init(self, parameterNode, prefix=None):
    self.parameterNode = parameterNode
    self._parameterGUIs = {}
    self._nextParameterGUIsTag = 0
    self._guiVtkObserverTags = {}
    self._updatingGUIFromParameterNode = False
    for name, parameter in self.allParameters.items():
        setattr(self, f"_{name}_impl", _Value(parameter, parameterNode, (prefix or "") + name))


def _update_gui(self):
    if self._updatingGUIFromParameterNode:
        return
    try:
        self._updatingGUIFromParameterNode = True
        with slicer.util.NodeModify(self):
            for mapping in self._parameterGUIs.values():
                for name, connector in mapping.items():
                    connector.write(self.getValue(name))
    finally:
        self._updatingGUIFromParameterNode = False


def _connectParametersToGui(self, mapping):
    for name in mapping:
        _check(self, name)
    connectors = {
        name: w if isinstance(w, GuiConnector) else createGuiConnector(w, self.dataType(name))
        for name, w in mapping.items()
    }
    tag = self._nextParameterGUIsTag
    self._nextParameterGUIsTag += 1
    self._parameterGUIs[tag] = connectors

    def callback(name, connector):
        def changed():
            with slicer.util.NodeModify(self):
                if not self._updatingGUIFromParameterNode:
                    self.setValue(name, connector.read())

        return changed

    for name, connector in connectors.items():
        connector.write(self.getValue(name))
        connector.onChanged(callback(name, connector))
    self._guiVtkObserverTags[tag] = self.AddObserver(
        vtk.vtkCommand.ModifiedEvent, lambda caller, event: _update_gui(self)
    )
    return tag


def _connectGui(self, gui):
    is_widget = getattr(gui, "isWidgetType", lambda: False)()
    widgets = gui.findChildren(qt.QWidget) if is_widget else gui.__dict__.values()
    mapping = {}
    for widget in widgets:
        name = widget.property(SlicerParameterNamePropertyName)
        if name:
            mapping[name] = widget
    return _connectParametersToGui(self, mapping)


def _disconnectGui(self, guiTag):
    for connector in self._parameterGUIs.pop(guiTag, {}).values():
        connector.onChanged(None)
    if guiTag in self._guiVtkObserverTags:
        self.RemoveObserver(self._guiVtkObserverTags.pop(guiTag))


def _getValue(self, name):
    _check(self, name)
    return getattr(self, f"_{name}_impl").read()


def _setValue(self, name, value):
    _check(self, name)
    getattr(self, f"_{name}_impl").write(value)


def _default(self, name):
    _check(self, name)
    return self.allParameters[name].default


def _isCached(self, name):
    _check(self, name)
    return self.allParameters[name].serializer.caching


def _member(name):
    return property(
        lambda self: getattr(self, f"_{name}_impl").read(),
        lambda self, value: getattr(self, f"_{name}_impl").write(value),
    )


def _wrap(cls):
    parameters = {}
    for name, annotated in typing.get_type_hints(cls, include_extras=True).items():
        default = Default(getattr(cls, name)) if hasattr(cls, name) else None
        try:
            parameters[name] = _Parameter(name, annotated, default)
        except Exception as e:
            raise Exception(f"Unable to create serializer for {cls} member {name}") from e
        setattr(cls, name, _member(name))

    @staticmethod
    def data_type(name):
        _check(cls, name)
        return parameters[name].annotated

    members = {
        "allParameters": parameters,
        "_is_parameter_node_wrapper": True,
        "default": _default,
        "isCached": _isCached,
        "dataType": data_type,
        "getValue": _getValue,
        "setValue": _setValue,
        "connectGui": _connectGui,
        "connectParametersToGui": _connectParametersToGui,
        "disconnectGui": _disconnectGui,
        "StartModify": lambda self: self.parameterNode.StartModify(),
        "EndModify": lambda self, was: self.parameterNode.EndModify(was),
        "AddObserver": lambda self, event, f, priority=0.0: self.parameterNode.AddObserver(event, f, priority),
        "RemoveObserver": lambda self, tag: self.parameterNode.RemoveObserver(tag),
        "Modified": lambda self: self.parameterNode.Modified(),
    }
    for name, value in members.items():
        if hasattr(cls, name):
            raise ValueError(f"Cannot use reserved name '{name}' in a parameterNodeWrapper")
        setattr(cls, name, value)
    cls.__init__ = _init
    return cls


def parameterNodeWrapper(classtype=None):
    """Class decorator, with or without parentheses."""
    return _wrap if classtype is None else _wrap(classtype)


def isParameterNodeWrapper(classOrObj):
    return getattr(classOrObj, "_is_parameter_node_wrapper", False)


def findChildWidgetForParameter(widget, parameter):
    for w in widget.findChildren(qt.QWidget):
        if w.property(SlicerParameterNamePropertyName) == parameter:
            return w
    return None


def install():
    module = sys.modules[__name__]
    sys.modules["slicer.parameterNodeWrapper"] = module
    slicer.parameterNodeWrapper = module

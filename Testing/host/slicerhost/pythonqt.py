"""The module `qt`: PySide6 with the behaviour of PythonQt.

PythonQt shows a Qt property as a plain value, refuses names that C++ does not have, knows signals by their
signature, and hides the base classes of what it wraps. PySide6 does none of this, so that a module tested with plain
PySide6 can fail in Slicer. The rules below follow PythonQtInstanceWrapper.cpp, PythonQtSignalReceiver.cpp and
PythonQtConversion.cpp of the PythonQt that Slicer builds (github.com/commontk/PythonQt).
"""

import ast
import enum
import os
import sys
import traceback
import types

# Before PySide6 is imported: enumerators are ints in PythonQt.
sys.pyside6_option_python_enum = 0x3

from PySide6 import QtCore, QtGui, QtNetwork, QtSvg, QtUiTools, QtWidgets  # noqa: E402
from shiboken6 import Shiboken  # noqa: E402

QObject = QtCore.QObject

# Virtual functions that Qt calls on Python subclasses: a Python property in their place breaks the call.
_VIRTUAL = {"sizeHint", "minimumSizeHint", "parent"}
_NOT_IN_PYTHONQT = {"Signal", "SignalInstance", "Slot", "Property", "ClassInfo", "QEnum", "QFlag", "QtMsgType"}

_plain_property = QObject.property
_plain_connect = QObject.connect
_plain_disconnect = QObject.disconnect
_plain_children = QObject.children
_plain_find_children = QObject.findChildren
_plain_set = Shiboken.Object.__setattr__

_native = set()  # classes that stand for a C++ class: PySide6's, and the stand-ins for ctk's and Slicer's
_signals = {}  # id of a built-in signal descriptor's class and name -> PySide6's own signal
_connections = {}  # (address of the C++ object, signature) -> [(callable, trampoline)]

errors = []  # exceptions raised inside slots and virtual calls: they make the exit code 1 under --testing


def exit_code(system_exit):
    """The code of a SystemExit; a message is printed and is 1."""
    code = system_exit.code
    if code is None or isinstance(code, int):
        return code or 0
    print(code, file=sys.stderr, flush=True)
    return 1


def handle_error():
    """Print the current exception and remember it, as PythonQt does for whatever Qt calls."""
    kind, value, tb = sys.exc_info()
    if isinstance(value, SystemExit):
        QtCore.QCoreApplication.instance().exit(exit_code(value))
        return
    errors.append(value)
    traceback.print_exception(kind, value, tb)
    sys.stderr.flush()


def call(function, args):
    """Call a slot with as many arguments as it takes (PythonQtSignalTarget::call); errors are printed, not raised."""
    code = None
    bound = 0
    if isinstance(function, types.FunctionType):
        code = function.__code__
    elif isinstance(function, types.MethodType) and isinstance(function.__func__, types.FunctionType):
        code, bound = function.__func__.__code__, 1
    if code is not None and not code.co_flags & 0x04:
        args = args[: max(code.co_argcount - bound, 0)]
    elif isinstance(function, types.BuiltinMethodType) and isinstance(function.__self__, QObject):
        args = args[: _slot_argument_count(function, len(args))]
    try:
        function(*args)
    except BaseException:
        handle_error()


def _slot_argument_count(slot, most):
    """A slot of Qt as the target, `clicked.connect(dialog.accept)`, gets what one of its overloads takes."""
    mo = slot.__self__.metaObject()
    methods = (mo.method(i) for i in range(mo.methodCount()))
    counts = [m.parameterCount() for m in methods if bytes(m.name().data()).decode() == slot.__name__]
    return max((c for c in counts if c <= most), default=most)


def normalized(signature):
    return bytes(QtCore.QMetaObject.normalizedSignature(signature).data()).decode()


def _address(obj):
    return Shiboken.getCppPointer(obj)[0]


def class_name(cls):
    return cls.__name__


# --------------------------------------------------------------------------------
# Signals


class HostSignal:
    """Signals of a stand-in class: one descriptor for all overloads of a name.

    Args:
        signatures: C++ signatures, such as ``"valueChanged(double)"``; the first is what attribute access connects.
    """

    def __init__(self, *signatures):
        self.signatures = [normalized(s) for s in signatures]

    def __set_name__(self, owner, name):
        self.name = name
        for s in self.signatures:
            if s.split("(")[0] != name:
                raise ValueError(f"{owner.__name__}.{name}: signature {s} has another name")

    def __get__(self, obj, owner=None):
        return self if obj is None else BoundSignal(obj, self.name, self.signatures)


class _QtSignal:
    """A signal that Qt itself declares."""

    def __init__(self, name, signal):
        self.name = name
        self.signal = signal

    def __get__(self, obj, owner=None):
        if obj is None:
            return self
        return BoundSignal(obj, self.name, signatures_of(obj, self.name), self.signal)


def signatures_of(obj, name=None):
    """Signatures of the signals that an object has, Qt's own and the stand-ins'."""
    found = []
    mo = obj.metaObject()
    for i in range(mo.methodCount()):
        m = mo.method(i)
        if m.methodType() == QtCore.QMetaMethod.MethodType.Signal:
            found.append(bytes(m.methodSignature().data()).decode())
    for cls in type(obj).__mro__:
        for value in vars(cls).values():
            if isinstance(value, HostSignal):
                found += value.signatures
    return [s for s in found if name is None or s.split("(")[0] == name]


def _host_signal(obj, signature):
    descriptor = getattr(type(obj), signature.split("(")[0], None)
    return descriptor if isinstance(descriptor, HostSignal) and signature in descriptor.signatures else None


class BoundSignal:
    """What `widget.clicked` is in PythonQt: connect, disconnect, emit, and a call emits too."""

    def __init__(self, obj, name, signatures, signal=None):
        self._obj, self._name, self._signatures, self._signal = obj, name, signatures, signal

    def connect(self, *args):
        return connect(self._obj, self._signatures[0], *args)

    def disconnect(self, *args):
        return disconnect(self._obj, self._signatures[0], *args)

    def emit(self, *args):
        if self._signal is not None:
            self._signal.__get__(self._obj, type(self._obj)).emit(*args)
            return
        fitting = [s for s in self._signatures if _argument_count(s) == len(args)]
        if not fitting:
            raise ValueError(f"{self._name}: no overload takes {len(args)} arguments")
        emit(self._obj, fitting[0], *args)

    __call__ = emit

    def __repr__(self):
        return f"<signal {self._name} of {type(self._obj).__name__}>"


def _argument_count(signature):
    inner = signature[signature.index("(") + 1 : -1]
    return inner.count(",") + 1 if inner else 0


def emit(obj, signature, *args):
    """Emit a signal of a stand-in."""
    if obj.signalsBlocked():
        return
    for function, _ in list(_connections.get((_address(obj), normalized(signature)), ())):
        call(function, args)


def _forget(address):
    for key in [k for k in _connections if k[0] == address]:
        del _connections[key]


def _target(args):
    """The Python callable that connect() and disconnect() name: a callable, or a receiver and its slot's signature."""
    if len(args) == 1 and callable(args[0]):
        return args[0]
    if len(args) >= 2 and isinstance(args[0], QObject) and isinstance(args[1], str):
        receiver, slot = args[0], args[1].lstrip("12")
        name = slot.split("(")[0]
        method = getattr(receiver, name, None)
        if method is None and receiver.metaObject().indexOfProperty(name) < 0:
            return None
        if isinstance(method, BoundSignal):
            return method.emit
        if not callable(method):
            return None
        count = _argument_count(normalized(slot)) if "(" in slot else 0
        return _Slot(receiver, name, count)
    raise ValueError("Called connect with wrong arguments: a callable, or a receiver and a slot signature are needed")


class _Slot:
    def __init__(self, receiver, name, count):
        self.receiver, self.name, self.count = receiver, name, count

    def __call__(self, *args):
        if Shiboken.isValid(self.receiver):
            getattr(self.receiver, self.name)(*args[: self.count])

    def __eq__(self, other):
        return isinstance(other, _Slot) and (self.receiver, self.name, self.count) == (
            other.receiver,
            other.name,
            other.count,
        )

    __hash__ = None


def connect(obj, signature, *args):
    """`obj.connect("clicked(bool)", f)`: False and a line on stderr where Qt refuses, never an exception."""
    signature = normalized(str(signature).lstrip("2"))
    known = _host_signal(obj, signature) is not None
    if not known and obj.metaObject().indexOfSignal(signature) < 0:
        print(f"QObject::connect: No such signal {type(obj).__name__}::{signature}", file=sys.stderr, flush=True)
        return False
    function = _target(args)
    if function is None:
        print(f"QObject::connect: No such slot {args[0].className()}::{args[1]}", file=sys.stderr, flush=True)
        return False
    address = _address(obj)
    key = (address, signature)
    if not any(k[0] == address for k in _connections):
        _plain_connect(obj, QtCore.SIGNAL("destroyed()"), lambda: _forget(address))

    def trampoline(*values):
        call(function, values)

    if not known:
        count = _argument_count(signature)
        # PySide6 counts the arguments of the callable, so that it has to have the signature's.
        names = ",".join(f"a{i}" for i in range(count))
        slot = eval(f"lambda {names}: trampoline({names})", {"trampoline": trampoline})
        if not _plain_connect(obj, QtCore.SIGNAL(signature), slot):
            return False
        trampoline = slot
    _connections.setdefault(key, []).append((function, trampoline))
    return True


def disconnect(obj, signature, *args):
    """`obj.disconnect("clicked(bool)", f)`; without f all Python connections of the signal go."""
    signature = normalized(str(signature).lstrip("2"))
    entries = _connections.get((_address(obj), signature), [])
    function = _target(args) if args else None
    gone = [e for e in entries if function is None or e[0] == function]
    for entry in gone:
        entries.remove(entry)
        if _host_signal(obj, signature) is None:
            _plain_disconnect(obj, QtCore.SIGNAL(signature), entry[1])
    return bool(gone)


# --------------------------------------------------------------------------------
# Attributes


def python_value(value):
    """QStringList and QList come as tuples in PythonQt."""
    return tuple(value) if isinstance(value, list) else value


def _reader(name):
    def read(self):
        return python_value(_plain_property(self, name))

    return property(read)


def _to_variant(prop, value):
    """PythonQtConv::PyObjToQVariant for the types that properties have; ValueError where PythonQt refuses."""
    kind = prop.typeName()
    if prop.isEnumType() or prop.isFlagType():
        return value
    if kind == "bool":
        return bool(value)
    if kind in ("int", "uint", "qlonglong", "long"):
        return int(value // 1) if isinstance(value, float) else int(value)
    if kind in ("double", "float"):
        return float(value)
    if kind == "QString":
        return value if isinstance(value, str) else str(value)
    if kind == "QStringList":
        return [v if isinstance(v, str) else str(v) for v in value]
    return value


def _set_attribute(self, name, value):
    cls = type(self)
    if name == "name":
        name = "objectName"
    mo = self.metaObject()
    index = mo.indexOfProperty(name)
    if index >= 0:
        prop = mo.property(index)
        if not prop.isWritable():
            raise AttributeError(f"Property '{name}' of {cls.__name__} object is not writable")
        try:
            ok = self.setProperty(name, _to_variant(prop, value))
        except (TypeError, ValueError, OverflowError):
            ok = False
        if not ok:
            raise AttributeError(
                f"Property '{name}' of type '{prop.typeName()}' does not accept an object of type "
                f"{type(value).__name__} ({value})"
            )
        return
    native = next(c for c in cls.__mro__ if c in _native)
    member = getattr(native, name, None)
    if member is not None and not name.startswith("__") and not hasattr(object, name):
        kind = "Signal" if isinstance(member, (HostSignal, _QtSignal)) else "Slot"
        if cls is native or kind == "Signal":
            raise AttributeError(f"{kind} '{name}' can not be overwritten on {cls.__name__} object")
    elif name in self.dynamicPropertyNames():
        self.setProperty(name, value)
        return
    if cls is native and name != "_d":
        raise AttributeError(
            f"'{name}' does not exist on {cls.__name__} and creating new attributes on C++ objects is not allowed"
        )
    _plain_set(self, name, value)


_plain_get = QObject.__getattribute__


def _get_attribute(self, name):
    if name == "connect":
        return types.MethodType(connect, self)
    if name == "disconnect":
        return types.MethodType(disconnect, self)
    return _plain_get(self, name)


def _missing_attribute(self, name):
    if not name.startswith("__") and Shiboken.isValid(self):
        if name == "name":
            return _plain_property(self, "objectName")
        if name in _dynamic_property_names(self):
            return python_value(_plain_property(self, name))
        for child in _plain_children(self):
            if _plain_property(child, "objectName") == name:
                return child
    raise AttributeError(f"{type(self).__name__} has no attribute named '{name}'")


def _dynamic_property_names(self):
    return [bytes(n.data()).decode() for n in _plain_dynamic(self)]


_plain_dynamic = QObject.dynamicPropertyNames


def _find_children(self, kind=None, name=None):
    children = [c for c in _plain_find_children(self, QObject) if name is None or c.objectName == name]
    if kind is None:
        return tuple(children)
    if isinstance(kind, str):
        return tuple(c for c in children if c.inherits(kind))
    return tuple(c for c in children if kind in type(c).__mro__)


def _find_child(self, kind=None, name=None):
    return next(iter(_find_children(self, kind, name)), None)


def make_native(cls):
    """Give a PySide6 class, or a stand-in derived from one, PythonQt's attributes."""
    _native.add(cls)
    if not issubclass(cls, QObject):
        return cls
    mo = cls.staticMetaObject
    for i in range(mo.propertyCount()):
        name = mo.property(i).name()
        if name in _VIRTUAL or isinstance(vars(cls).get(name), QtCore.Property):
            continue
        if i >= mo.propertyOffset() or name in vars(cls):
            setattr(cls, name, _reader(name))
    for name, value in list(vars(cls).items()):
        if type(value) is QtCore.Signal:
            setattr(cls, name, _QtSignal(name, value))
    cls.__setattr__ = _set_attribute
    cls.__getattr__ = _missing_attribute
    return cls


def _patch_qobject():
    QObject.connect = connect
    QObject.disconnect = disconnect
    # PySide6 looks up these two before the class's dictionary, because they are static as well.
    QObject.__getattribute__ = _get_attribute
    QObject.className = lambda self: self.metaObject().className()
    QObject.children = lambda self: tuple(_plain_children(self))
    QObject.findChildren = _find_children
    QObject.findChild = _find_child
    QObject.dynamicPropertyNames = _dynamic_property_names
    QObject.delete = lambda self: Shiboken.delete(self)
    QObject.name = property(lambda self: _plain_property(self, "objectName"))
    plain = QObject.property
    QObject.property = lambda self, name: python_value(plain(self, name))


# --------------------------------------------------------------------------------
# isinstance: PythonQt's wrappers have no base classes, so that a button is not a QWidget


_OWN = tuple(os.path.dirname(os.path.abspath(p)) + os.sep for p in (__file__, QtCore.__file__, Shiboken.__file__))


def _is_instance(cls, obj):
    if cls in type(obj).__mro__:
        file = sys._getframe(1).f_code.co_filename
        if cls not in _native or file.startswith(_OWN) or "shibokensupport" in file or file.startswith("<"):
            return True
        for base in type(obj).__mro__:
            if base is cls:
                return True
            if base in _native:
                return False
    return type.__instancecheck__(cls, obj) if cls not in _native else False


# --------------------------------------------------------------------------------
# Functions that PythonQt has in another form


def _single_shot(msec, receiver, member=None):
    """slicerqt.py replaces QTimer.singleShot by this: a property of the same name hides the static function."""
    timer = QtCore.QTimer(QtCore.QCoreApplication.instance())
    timer.setSingleShot(True)
    args = (receiver,) if callable(receiver) else (receiver, member)
    connect(timer, "timeout()", *args)
    connect(timer, "timeout()", timer.deleteLater)
    timer.start(int(msec))


def _first_only(function):
    """PySide6 returns (value, filter) or (value, ok) where PythonQt returns the value."""

    def wrapper(*args, **kwargs):
        value = function(*args, **kwargs)[0]
        return python_value(value)

    return staticmethod(wrapper)


def _patch_functions():
    QtCore.QTimer.singleShot = staticmethod(_single_shot)
    for cls, names in (
        (QtWidgets.QFileDialog, ("getOpenFileName", "getOpenFileNames", "getSaveFileName")),
        (QtWidgets.QInputDialog, ("getText", "getItem", "getInt", "getDouble", "getMultiLineText")),
    ):
        for name in names:
            setattr(cls, name, _first_only(getattr(cls, name)))
    plain_write = QtCore.QIODevice.write

    def write(self, data, *args):
        return plain_write(self, data.encode() if isinstance(data, str) else data, *args)

    QtCore.QIODevice.write = write


class QUiLoader(QtUiTools.QUiLoader):
    """Loads .ui files with the stand-in widgets; a class that is not known is an error, never a plain QWidget."""

    custom = {}

    def load(self, device, parent=None):
        import xml.etree.ElementTree as ET

        root = ET.fromstring(bytes(device.readAll().data()))
        for name in {element.get("class") for element in root.iter("widget")} & set(self.custom):
            self.registerCustomWidget(self.custom[name])
        for element in root.iter("widget"):
            name = element.get("class")
            if name not in self.custom and not hasattr(QtWidgets, name):
                raise RuntimeError(f"The stand-in host has no widget class {name} (in the .ui file)")
            if name in self.custom:
                self._enumerators(element)
        # Qt cannot see the signals and slots of the stand-ins, so that the connections are made here.
        links = [
            {part.tag: part.text for part in c if part.tag in ("sender", "signal", "receiver", "slot")}
            for c in root.iter("connection")
        ]
        for c in root.findall("connections"):
            root.remove(c)
        buffer = QtCore.QBuffer()
        buffer.setData(ET.tostring(root, encoding="utf-8"))
        buffer.open(QtCore.QIODevice.OpenModeFlag.ReadOnly)
        widget = super().load(buffer, parent)
        if widget is None:
            return None
        named = {w.objectName: w for w in (widget, *_find_children(widget))}
        for link in links:
            sender, receiver = named.get(link["sender"]), named.get(link["receiver"])
            if sender is None or receiver is None:
                print(f"QFormBuilder: connection between unknown objects: {link}", file=sys.stderr, flush=True)
                continue
            connect(sender, link["signal"], receiver, link["slot"])
        return widget

    def _enumerators(self, element):
        """Qt cannot see the enumerators of the stand-ins: ctkPathLineEdit::Files|ctkPathLineEdit::Readable."""
        for prop in element.findall("property"):
            for value in (*prop.findall("enum"), *prop.findall("set")):
                names = [n.strip().rpartition("::") for n in value.text.split("|")]
                if not all(owner in self.custom for owner, _, _ in names):
                    continue
                number = 0
                for owner, _, name in names:
                    number |= getattr(self.custom[owner], name)
                value.tag, value.text = "number", str(number)


def _classes():
    for module in (QtCore, QtGui, QtWidgets, QtNetwork, QtSvg, QtUiTools):
        for name in dir(module):
            value = getattr(module, name)
            if isinstance(value, type) and not name.startswith("_") and name not in _NOT_IN_PYTHONQT:
                yield name, value


def scoped_enumerators(path):
    """Lines that say qt.QMessageBox.StandardButton.Ok: PythonQt's enumerations have no members, PySide6's do."""
    qt = sys.modules["qt"]
    with open(path, encoding="utf-8") as f:
        tree = ast.parse(f.read(), path)
    found = []
    for node in ast.walk(tree):
        names = []
        part = node
        while isinstance(part, ast.Attribute):
            names.insert(0, part.attr)
            part = part.value
        if len(names) == 3 and isinstance(part, ast.Name) and part.id == "qt":
            owner = getattr(getattr(qt, names[0], None), names[1], None)
            if isinstance(owner, enum.EnumMeta):
                short = f"qt.{names[0]}.{names[2]}"
                found.append(f"{path}:{node.lineno}: qt.{'.'.join(names)} fails in Slicer: write {short}")
    return found


def install():
    """Make `import qt` work. Returns the module."""
    _patch_qobject()
    module = types.ModuleType("qt", "Qt, through PySide6, with PythonQt's behaviour")
    classes = dict(_classes())
    for cls in classes.values():
        _native.add(cls)
    ordered = sorted((c for c in classes.values() if issubclass(c, QObject)), key=lambda c: len(c.__mro__))
    for cls in ordered:
        make_native(cls)
    _patch_functions()
    QUiLoader.__qualname__ = "QUiLoader"
    _native.add(QUiLoader)
    classes["QUiLoader"] = QUiLoader
    type(QObject).__instancecheck__ = _is_instance
    vars(module).update(classes)
    module.Qt = QtCore.Qt
    sys.modules["qt"] = module
    return module

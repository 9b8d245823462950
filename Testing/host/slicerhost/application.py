"""slicer.app, the module manager and the modules, after qSlicerCoreApplication.h and qSlicerModuleManager.h."""

import importlib.util
import os
import pathlib
import sys
import traceback
import types

import qt
import slicer
from PySide6 import QtCore, QtWidgets
from shiboken6 import Shiboken

from . import pythonqt
from .ctkwidgets import stand_in, state, stored
from .mrmlwidgets import observe
from .pythonqt import HostSignal, emit

VERSION = (5, 12, 3)

# Modules of Slicer itself, and the logic that slicer-core has of them.
CORE_MODULES = {
    "Colors": "vtkSlicerColorLogic",
    "CropVolume": "vtkSlicerCropVolumeLogic",
    "Data": None,
    "Markups": "vtkSlicerMarkupsLogic",
    "Models": "vtkSlicerModelsLogic",
    "Segmentations": "vtkSlicerSegmentationsModuleLogic",
    "SubjectHierarchy": "vtkSlicerSubjectHierarchyModuleLogic",
    "Tables": "vtkSlicerTablesLogic",
    "Texts": "vtkSlicerTextsLogic",
    "Transforms": "vtkSlicerTransformLogic",
    "Volumes": "vtkSlicerVolumesLogic",
}


def read(kind, value):
    """A read-only Qt property."""
    return QtCore.Property(kind, value)


# --------------------------------------------------------------------------------
# Modules


class _Module(QtCore.QObject):
    """qSlicerAbstractCoreModule."""

    def _start(self, name, path, logic=None):
        d = state(self, name=name, path=path, logic=logic, widget=None, title=name, categories=[], contributors=[])
        d.dependencies, d.helpText, d.acknowledgementText, d.hidden, d.index = [], "", "", False, -1
        d.associatedNodeTypes, d.icon = [], qt.QIcon()

    def mrmlScene(self):
        return slicer.mrmlScene

    def widgetRepresentation(self):
        if self._d.widget is None:
            self._d.widget = self._new_widget()
        return self._d.widget

    path = read(str, lambda self: self._d.path)
    isInstalled = read(bool, lambda self: False)


class _CoreModule(_Module):
    name = read(str, lambda self: self._d.name)
    title = read(str, lambda self: self._d.title)
    hidden = read(bool, lambda self: self._d.hidden)

    def logic(self):
        return self._d.logic

    def _new_widget(self):
        return qSlicerAbstractModuleWidget()


@stand_in
class qSlicerLoadableModule(_CoreModule):
    def __init__(self, name, logic):
        super().__init__()
        self._start(name, "", logic)


@stand_in
class qSlicerScriptedLoadableModule(_Module):
    """The `parent` of a ScriptedLoadableModule."""

    def __init__(self, name, path):
        super().__init__()
        self._start(name, path, slicer.vtkSlicerScriptedLoadableModuleLogic())
        self._d.instance = None

    def logic(self):
        return self._d.logic

    def _new_widget(self):
        widget = qSlicerScriptedLoadableModuleWidget()
        widget._load(self._d.name, self._d.path)
        widget._setup()
        return widget

    def createNewWidgetRepresentation(self):
        return self._new_widget()

    name = read(str, lambda self: self._d.name)
    title = stored(str, "title")
    categories = stored("QStringList", "categories")
    contributors = stored("QStringList", "contributors")
    dependencies = stored("QStringList", "dependencies")
    associatedNodeTypes = stored("QStringList", "associatedNodeTypes")
    helpText = stored(str, "helpText")
    acknowledgementText = stored(str, "acknowledgementText")
    hidden = stored(bool, "hidden")
    index = stored(int, "index")
    icon = stored("QVariant", "icon")


@stand_in
class qSlicerAbstractModuleWidget(QtWidgets.QWidget):
    mrmlSceneChanged = HostSignal("mrmlSceneChanged(vtkMRMLScene*)")

    def __init__(self, parent=None):
        super().__init__(parent)
        state(self, entered=False, scene=None)

    def enter(self):
        self._d.entered = True

    def exit(self):
        self._d.entered = False

    def mrmlScene(self):
        return self._d.scene

    def setMRMLScene(self, scene):
        if scene is not self._d.scene:
            self._d.scene = scene
            emit(self, "mrmlSceneChanged(vtkMRMLScene*)", scene)

    isEntered = read(bool, lambda self: self._d.entered)


@stand_in
class qSlicerScriptedLoadableModuleWidget(qSlicerAbstractModuleWidget):
    """The `parent` of a ScriptedLoadableModuleWidget; errors in its methods are printed, as PythonQt does."""

    def __init__(self, parent=None):
        super().__init__(parent)
        self._d.instance, self._d.name, self._d.path = None, "", ""
        QtWidgets.QVBoxLayout(self)

    def _load(self, name, path):
        self._d.name, self._d.path = name, path
        try:
            cls = getattr(sys.modules[name], name + "Widget")
            self._d.instance = cls(self)
        except Exception:
            pythonqt.handle_error()
            return
        setattr(slicer.modules, name + "Widget", self._d.instance)

    def _setup(self):
        self.setMRMLScene(slicer.mrmlScene)
        self._method("setup")

    def _method(self, name):
        method = getattr(self._d.instance, name, None)
        if method is not None:
            pythonqt.call(method, ())

    def self(self):
        return self._d.instance

    def reload(self):
        self._load(self._d.name, self._d.path)
        self._setup()

    def enter(self):
        super().enter()
        self._method("enter")

    def exit(self):
        super().exit()
        self._method("exit")

    moduleName = read(str, lambda self: self._d.name)


@stand_in
class qSlicerModuleFactoryManager(QtCore.QObject):
    modulesRegistered = HostSignal("modulesRegistered(QStringList)")

    def __init__(self, manager):
        super().__init__()
        state(self, manager=manager)

    def loadedModuleNames(self):
        return tuple(self._d.manager._d.modules)

    registeredModuleNames = instantiatedModuleNames = loadedModuleNames

    def isLoaded(self, name):
        return name in self._d.manager._d.modules

    isRegistered = isInstantiated = isLoaded


@stand_in
class qSlicerModuleManager(QtCore.QObject):
    moduleLoaded = HostSignal("moduleLoaded(QString)")
    moduleAboutToBeUnloaded = HostSignal("moduleAboutToBeUnloaded(QString)")
    allModulesLoaded = HostSignal("allModulesLoaded()")

    def __init__(self):
        super().__init__()
        state(self, modules={}, factory=qSlicerModuleFactoryManager(self))

    def factoryManager(self):
        return self._d.factory

    def module(self, name):
        return self._d.modules.get(name)

    def modulesNames(self):
        return tuple(self._d.modules)

    def _add(self, module):
        name = module.name
        self._d.modules[name] = module
        setattr(slicer.modules, name.lower(), module)
        setattr(slicer.moduleNames, name, name)
        emit(self, "moduleLoaded(QString)", name)

    def _load_core(self, logic_of_app):
        for name, kind in CORE_MODULES.items():
            logic = None
            if kind is not None:
                logic = getattr(slicer, kind)()
                logic.SetMRMLApplicationLogic(logic_of_app)
                logic_of_app.SetModuleLogic(name, logic)
                if name == "Colors":
                    logic_of_app.SetColorLogic(logic)
                logic.SetMRMLScene(slicer.mrmlScene)
            self._add(qSlicerLoadableModule(name, logic))

    def _load_scripted(self, folders):
        """Every .py file in a folder is taken for a module, as Slicer does: one without the class is an error."""
        found = []
        for folder in folders:
            folder = os.path.abspath(folder)
            for file in sorted(os.listdir(folder)):
                if file.endswith(".py") and not file.startswith("_"):
                    found.append((file[:-3], os.path.join(folder, file)))
        for _, path in found:
            folder = os.path.dirname(path)
            if folder not in sys.path:
                sys.path.append(folder)
        for name, path in found:
            self._load_one(name, path)
        for folder in folders:
            for path in sorted(pathlib.Path(folder).rglob("*.py")):
                check_source(path)

    def _load_one(self, name, path):
        module = qSlicerScriptedLoadableModule(name, path)
        try:
            spec = importlib.util.spec_from_file_location(name, path)
            python = importlib.util.module_from_spec(spec)
            sys.modules[name] = python
            try:
                spec.loader.exec_module(python)
            except BaseException:
                del sys.modules[name]
                raise
            if not hasattr(python, name):
                raise RuntimeError(f"Failed to load scripted loadable module: class {name} was not found in {path}")
            instance = getattr(python, name)(module)
        except Exception:
            pythonqt.handle_error()
            print(f'Fail to instantiate module "{name}"', file=sys.stderr, flush=True)
            return
        module._d.instance = instance
        setattr(slicer.modules, name + "Instance", instance)
        module._d.logic.SetMRMLScene(slicer.mrmlScene)
        self._add(module)
        setup = getattr(instance, "setup", None)
        if setup is not None:
            pythonqt.call(setup, ())

    def _unload_all(self):
        for name in reversed(list(self._d.modules)):
            emit(self, "moduleAboutToBeUnloaded(QString)", name)


# --------------------------------------------------------------------------------
# Main window


@stand_in
class qSlicerModuleSelectorToolBar(QtWidgets.QToolBar):
    moduleSelected = HostSignal("moduleSelected(QString)")

    def __init__(self, window):
        super().__init__(window)
        state(self, window=window, selected="")

    def selectModule(self, name):
        manager = slicer.app.moduleManager()
        module = manager.module(name)
        if module is None or name == self._d.selected:
            return
        self._leave()
        self._d.selected = name
        widget = module.widgetRepresentation()
        self._d.window._panel(widget)
        widget.enter()
        emit(self, "moduleSelected(QString)", name)

    def _leave(self):
        before = slicer.app.moduleManager().module(self._d.selected)
        if before is not None and before._d.widget is not None and Shiboken.isValid(before._d.widget):
            before._d.widget.exit()
        self._d.selected = ""

    selectedModule = read(str, lambda self: self._d.selected)


@stand_in
class qSlicerMainWindow(QtWidgets.QMainWindow):
    def __init__(self):
        super().__init__()
        self.objectName = "qSlicerMainWindow"
        area = QtWidgets.QScrollArea()
        area.setWidgetResizable(True)
        area.setFixedWidth(480)
        dock = QtWidgets.QDockWidget("")
        dock.objectName = "PanelDockWidget"
        dock.setFeatures(QtWidgets.QDockWidget.DockWidgetFeature.NoDockWidgetFeatures)
        dock.setTitleBarWidget(QtWidgets.QWidget())
        dock.setWidget(area)
        state(self, area=area, selector=None)
        self.addDockWidget(QtCore.Qt.DockWidgetArea.LeftDockWidgetArea, dock)
        self._d.selector = qSlicerModuleSelectorToolBar(self)
        self._d.selector.hide()
        self.setStatusBar(QtWidgets.QStatusBar())
        self.resize(1400, 900)

    def moduleSelector(self):
        return self._d.selector

    def _panel(self, widget):
        self._d.area.takeWidget()
        self._d.area.setWidget(widget)
        widget.show()


# --------------------------------------------------------------------------------
# Application


class CommandOptions:
    def __init__(self, options):
        self.testingEnabled = options.testing
        self.noMainWindow = options.no_main_window
        self.runPythonAndExit = options.testing or bool(options.code)
        self.pythonScript = options.python_script or ""


@stand_in
class qSlicerExtensionsManagerModel(QtCore.QObject):
    """No extension is installed, and none can be: a test injects what it needs."""

    def __init__(self):
        super().__init__()

    def isExtensionInstalled(self, name):
        return False

    def installedExtensions(self):
        return ()


@stand_in
class qSlicerApplication(QtWidgets.QApplication):
    startupCompleted = HostSignal("startupCompleted()")
    mrmlSceneChanged = HostSignal("mrmlSceneChanged(vtkMRMLScene*)")
    renderPaused = HostSignal("renderPaused(bool)")

    def __init__(self, options, home, temporary):
        super().__init__([options.program])
        self.setApplicationName("Slicer")
        self.setOrganizationName("slicer.org")
        self.setApplicationVersion(".".join(map(str, VERSION)))
        self.setQuitOnLastWindowClosed(False)
        d = state(self, options=CommandOptions(options), home=home, temporaryPath=temporary, cachePath=temporary)
        d.startupEnvironment = dict(os.environ)
        d.startupWorkingPath, d.extensionsInstallPath, d.defaultScenePath = os.getcwd(), "", ""
        d.scene, d.logic, d.modules, d.io, d.layout, d.window = None, None, None, None, None, None
        d.settings, d.extensions, d.exitCode, d.exiting = qt.QSettings(), qSlicerExtensionsManagerModel(), 0, False

    def _start(self, io, layout_manager):
        """Scene, logics, modules, main window, in Slicer's order."""
        d = self._d
        d.scene = slicer.vtkMRMLScene()
        slicer.mrmlScene = d.scene
        d.logic = slicer.vtkSlicerApplicationLogic()
        d.logic.SetMRMLScene(d.scene)
        d.logic.SetHomeDirectory(d.home)
        d.logic.SetShareDirectory(self.slicerSharePath)
        d.logic.SetTemporaryPath(d.temporaryPath)
        d.scene.SetRootDirectory(d.temporaryPath)
        # Bundles (.mrb) are unpacked into the remote cache.
        cache, io_manager = slicer.vtkCacheManager(), slicer.vtkDataIOManager()
        cache.SetRemoteCacheDirectory(d.cachePath)
        io_manager.SetCacheManager(cache)
        d.scene.SetCacheManager(cache)
        d.scene.SetDataIOManager(io_manager)
        d.modules = qSlicerModuleManager()
        d.io = io
        self._observe_subject_hierarchy()
        if not d.options.noMainWindow:
            d.window = qSlicerMainWindow()
            d.layout = layout_manager(d.window, d.logic)
            d.layout.setLayout(slicer.vtkMRMLLayoutNode.SlicerLayoutConventionalView)
        d.modules._load_core(d.logic)

    def _observe_subject_hierarchy(self):
        """qSlicerSubjectHierarchyPluginLogic: an item for each visible node with data, gone with the node."""
        kind = slicer.vtkMRMLScene
        observe(self, self._d.scene, kind.NodeAddedEvent, "_node_added")
        observe(self, self._d.scene, kind.NodeAboutToBeRemovedEvent, "_node_removed")
        observe(self, self._d.scene, kind.EndImportEvent, "_imported")

    def _node_added(self, node):
        scene = self._d.scene
        if node is None or scene.IsImporting() or node.GetHideFromEditors():
            return
        sh = scene.GetSubjectHierarchyNode()
        if node.IsA("vtkMRMLStorableNode") and not node.IsA("vtkMRMLColorNode") and not sh.GetItemByDataNode(node):
            sh.CreateItem(sh.GetSceneItemID(), node)

    def _node_removed(self, node):
        scene = self._d.scene
        if node is None or scene.IsClosing() or node.IsA("vtkMRMLSubjectHierarchyNode"):
            return
        sh = scene.GetSubjectHierarchyNode()
        item = sh.GetItemByDataNode(node)
        if item:
            sh.RemoveItem(item, False, False)

    def _imported(self, _):
        for i in range(self._d.scene.GetNumberOfNodes()):
            self._node_added(self._d.scene.GetNthNode(i))

    # ---- Q_INVOKABLE ---

    def commandOptions(self):
        return self._d.options

    def testingEnabled(self):
        return self._d.options.testingEnabled

    def mrmlScene(self):
        return self._d.scene

    def applicationLogic(self):
        return self._d.logic

    def moduleManager(self):
        return self._d.modules

    def moduleLogic(self, name):
        return self._d.logic.GetModuleLogic(name)

    def coreIOManager(self):
        return self._d.io

    def ioManager(self):
        return self._d.io

    def layoutManager(self):
        return self._d.layout

    def extensionsManagerModel(self):
        return self._d.extensions

    def pythonConsole(self):
        return None

    def settings(self):
        return self._d.settings

    userSettings = revisionUserSettings = defaultSettings = settings

    def startupEnvironment(self):
        environment = qt.QProcessEnvironment()
        for key, value in self._d.startupEnvironment.items():
            environment.insert(key, value)
        return environment

    def environment(self):
        return qt.QProcessEnvironment.systemEnvironment()

    def setEnvironmentVariable(self, key, value):
        os.environ[key] = value

    def moduleDocumentationUrl(self, name):
        return f"{self.documentationBaseUrl}user_guide/modules/{name.lower()}.html"

    def toSlicerHomeAbsolutePath(self, path):
        return path if os.path.isabs(path) else os.path.join(self.slicerHome, path)

    def pauseRender(self):
        emit(self, "renderPaused(bool)", True)

    def resumeRender(self):
        emit(self, "renderPaused(bool)", False)

    def setRenderPaused(self, pause):
        emit(self, "renderPaused(bool)", pause)

    def restart(self):
        raise RuntimeError("The stand-in host cannot restart")

    def exit(self, code=0):
        """The code of the process; a script that is running goes on to its end."""
        self._d.exitCode, self._d.exiting = code, True
        QtWidgets.QApplication.exit(code)

    def quit(self):
        self.exit(0)

    # ---- properties ---

    slicerHome = read(str, lambda self: self._d.home)
    slicerSharePath = read(str, lambda self: "share/Slicer-5.12")
    temporaryPath = stored(str, "temporaryPath")
    cachePath = stored(str, "cachePath")
    defaultScenePath = stored(str, "defaultScenePath")
    extensionsInstallPath = stored(str, "extensionsInstallPath")
    startupWorkingPath = read(str, lambda self: self._d.startupWorkingPath)
    slicerUserSettingsFilePath = read(str, lambda self: self._d.settings.fileName())
    isInstalled = read(bool, lambda self: True)
    revision = read(str, lambda self: "0")
    repositoryRevision = read(str, lambda self: "stand-in")
    majorVersion = read(int, lambda self: VERSION[0])
    minorVersion = read(int, lambda self: VERSION[1])
    mainApplicationName = read(str, lambda self: "Slicer")
    mainApplicationDisplayName = read(str, lambda self: "3D Slicer")
    mainApplicationMajorVersion = read(int, lambda self: VERSION[0])
    mainApplicationMinorVersion = read(int, lambda self: VERSION[1])
    mainApplicationPatchVersion = read(int, lambda self: VERSION[2])
    isCustomMainApplication = read(bool, lambda self: False)
    documentationBaseUrl = read(str, lambda self: "https://slicer.readthedocs.io/en/5.12/")
    documentationVersion = read(str, lambda self: "5.12")
    documentationLanguage = read(str, lambda self: "en")
    applicationLocaleName = read(str, lambda self: "en_US")
    platform = read(str, lambda self: f"{sys.platform}-stand-in")
    os = read(str, lambda self: {"darwin": "macosx", "win32": "win"}.get(sys.platform, "linux"))
    arch = read(str, lambda self: "amd64")


def check_source(path):
    for line in pythonqt.scoped_enumerators(path):
        pythonqt.errors.append(line)
        print(line, file=sys.stderr, flush=True)


def run_script(path):
    """ctkAbstractPythonManager::executeFile: in __main__, its folder first on sys.path. Returns the exit code."""
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
    sys.modules["__main__"].__file__ = path
    check_source(path)
    with open(path, encoding="utf-8") as f:
        return run_code(f.read(), path)


def run_code(text, path="<string>"):
    """Run text in __main__. Returns 0, 1 after an exception, or the code of a SystemExit."""
    try:
        exec(compile(text, path, "exec"), vars(sys.modules["__main__"]))
    except SystemExit as e:
        return pythonqt.exit_code(e)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def install():
    for name in ("modules", "moduleNames"):
        module = types.ModuleType("slicer." + name)
        sys.modules["slicer." + name] = module
        setattr(slicer, name, module)
    for cls in (
        qSlicerLoadableModule,
        qSlicerScriptedLoadableModule,
        qSlicerAbstractModuleWidget,
        qSlicerScriptedLoadableModuleWidget,
        qSlicerModuleManager,
        qSlicerApplication,
        qSlicerMainWindow,
    ):
        setattr(slicer, cls.__name__, cls)

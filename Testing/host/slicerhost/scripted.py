"""The modules `slicer.ScriptedLoadableModule`, `slicer.i18n` and `slicer.testing`, after Slicer's own."""

import importlib
import logging
import os
import sys
import types
import unittest

import qt
import slicer


def tr(text):
    """Text for the user: the stand-in has no translations, but refuses what lupdate could not extract."""
    if not isinstance(text, str):
        raise TypeError(f"_() takes a string, not {type(text).__name__}")
    return text


def translate(context, text):
    return tr(text)


class ScriptedLoadableModule:
    def __init__(self, parent):
        self.parent = parent
        self.moduleName = self.__class__.__name__
        parent.title = ""
        parent.categories = []
        parent.dependencies = []
        parent.contributors = ["Anonymous"]
        parent.helpText = "This module was created from a template and the help section has not yet been updated."
        parent.acknowledgementText = ""
        for extension in (".svg", ".png"):
            icon = self.resourcePath("Icons/" + self.moduleName + extension)
            if os.path.isfile(icon):
                parent.icon = qt.QIcon(icon)
                break
        slicer.selfTests[self.moduleName] = self.runTest

    def resourcePath(self, filename):
        return os.path.join(os.path.dirname(self.parent.path), "Resources", filename)

    def getDefaultModuleDocumentationLink(self, docPage=None):
        url = (
            slicer.app.documentationBaseUrl + docPage if docPage else slicer.app.moduleDocumentationUrl(self.moduleName)
        )
        return f'<p>For more information, see the <a href="{url}">online documentation</a>.</p>'

    def runTest(self, msec=100, **kwargs):
        module = importlib.import_module(self.__module__)
        name = self.moduleName + "Test"
        if not hasattr(module, name):
            raise AssertionError(f"Test case class not found: {self.__module__}.{name} ")
        testCase = getattr(module, name)()
        testCase.messageDelay = msec
        testCase.runTest(**kwargs)


class ScriptedLoadableModuleWidget:
    def __init__(self, parent=None):
        super().__init__()
        self.moduleName = self.__class__.__name__.removesuffix("Widget")
        self.developerMode = slicer.util.settingsValue("Developer/DeveloperMode", False, converter=slicer.util.toBool)
        if not parent:
            self.parent = slicer.qMRMLWidget()
            self.parent.setLayout(qt.QVBoxLayout())
            self.parent.setMRMLScene(slicer.mrmlScene)
        else:
            self.parent = parent
        self.layout = self.parent.layout()
        if not parent:
            self.setup()
            self.parent.show()
        slicer.app.moduleManager().connect("moduleAboutToBeUnloaded(QString)", self._onModuleAboutToBeUnloaded)

    def resourcePath(self, filename):
        return os.path.join(os.path.dirname(slicer.util.modulePath(self.moduleName)), "Resources", filename)

    def cleanup(self):
        pass

    def _onModuleAboutToBeUnloaded(self, moduleName):
        if moduleName == self.moduleName:
            self.cleanup()
            slicer.app.moduleManager().disconnect("moduleAboutToBeUnloaded(QString)", self._onModuleAboutToBeUnloaded)

    def setupDeveloperSection(self):
        if not self.developerMode:
            return
        row = qt.QHBoxLayout()
        for text, slot in (("Reload", self.onReload), ("Reload and Test", self.onReloadAndTest)):
            button = qt.QPushButton(text)
            button.connect("clicked()", slot)
            row.addWidget(button)
        self.layout.addLayout(row)

    def setup(self):
        self.setupDeveloperSection()

    def onReload(self):
        print("Reloading module: " + self.moduleName)
        slicer.util.reloadScriptedModule(self.moduleName)

    def onTest(self, **kwargs):
        with slicer.util.tryWithErrorDisplay("Test failed."):
            slicer.selfTests[self.moduleName](msec=0, **kwargs)

    def onReloadAndTest(self, **kwargs):
        with slicer.util.tryWithErrorDisplay("Reload and Test failed."):
            self.onReload()
            slicer.selfTests[self.moduleName](msec=0, **kwargs)


class ScriptedLoadableModuleLogic:
    def __init__(self, parent=None):
        super().__init__()
        self.moduleName = self.__class__.__name__.removesuffix("Logic")
        self.isSingletonParameterNode = True

    def getParameterNode(self):
        if self.isSingletonParameterNode:
            node = slicer.mrmlScene.GetSingletonNode(self.moduleName, "vtkMRMLScriptedModuleNode")
            if node:
                # Closing the scene may have removed the attribute.
                if node.GetAttribute("ModuleName") != self.moduleName:
                    node.SetAttribute("ModuleName", self.moduleName)
                return node
        else:
            nodes = self.getAllParameterNodes()
            if nodes:
                return nodes[0]
        return slicer.mrmlScene.AddNode(self.createParameterNode())

    def getAllParameterNodes(self):
        nodes = slicer.util.getNodesByClass("vtkMRMLScriptedModuleNode")
        return [n for n in nodes if n.GetAttribute("ModuleName") == self.moduleName]

    def createParameterNode(self):
        node = slicer.mrmlScene.CreateNodeByClass("vtkMRMLScriptedModuleNode")
        node.UnRegister(None)
        if self.isSingletonParameterNode:
            node.SetSingletonTag(self.moduleName)
        node.SetAttribute("ModuleName", self.moduleName)
        node.SetName(slicer.mrmlScene.GenerateUniqueName(self.moduleName))
        return node


class ScriptedLoadableModuleTest(unittest.TestCase):
    def __init__(self, *args, **kwargs):
        self.moduleTestNames = []
        super().__init__(*args, **kwargs)
        self.enableScreenshots = False
        self.screenshotScaleFactor = 1.0
        if not self.moduleTestNames:
            self.moduleTestNames = [m for m in dir(self) if "test" in m and callable(getattr(self, m))]

    def delayDisplay(self, message, requestedDelay=None, msec=None):
        msec = getattr(self, "messageDelay", msec)
        slicer.util.delayDisplay(message, next((d for d in (msec, requestedDelay) if d is not None), 100))

    def takeScreenshot(self, name, description, type=-1):
        self.delayDisplay(description)

    def setUp(self):
        return

    def tearDown(self):
        return

    def runTest(self):
        """Every method whose name contains "test", in the order of their names."""
        if not self.moduleTestNames:
            logging.warning("No test is defined in " + self.__class__.__name__)
            return
        self.setUpClass()
        for name in self.moduleTestNames:
            self.setUp()
            logging.info(f"Running {name}")
            getattr(self, name)()
            self.tearDown()
        self.tearDownClass()


def runUnitTest(path, testname):
    """slicer.testing.runUnitTest: what slicer_add_python_unittest calls."""
    sys.path.extend([path] if isinstance(path, str) else path)
    print(f"{'-' * 43}\npath: {path}\ntestname: {testname}\n{'-' * 43}")
    suite = unittest.TestLoader().loadTestsFromName(testname)
    if not unittest.TextTestRunner(verbosity=2).run(suite).wasSuccessful():
        exitFailure()


def exitSuccess():
    pass


def exitFailure(message=""):
    raise Exception(message)


def _module(name, members):
    module = types.ModuleType(name)
    vars(module).update(members)
    sys.modules[name] = module
    setattr(slicer, name.split(".")[-1], module)


def install():
    classes = (
        ScriptedLoadableModule,
        ScriptedLoadableModuleWidget,
        ScriptedLoadableModuleLogic,
        ScriptedLoadableModuleTest,
    )
    slicer.selfTests = {}
    _module(
        "slicer.ScriptedLoadableModule", {c.__name__: c for c in classes} | {"__all__": [c.__name__ for c in classes]}
    )
    _module("slicer.i18n", {"tr": tr, "translate": translate})
    testing = (runUnitTest, exitSuccess, exitFailure)
    _module("slicer.testing", {f.__name__: f for f in testing})

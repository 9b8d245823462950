"""Reading and writing: the part of qSlicerCoreIOManager that slicer.util uses, on slicer-core's storage nodes."""

import os

import slicer

# File type, node class, extensions, as Slicer's readers and writers name them.
TYPES = (
    ("VolumeFile", "vtkMRMLVolumeNode", (".nrrd", ".nhdr", ".nii", ".nii.gz", ".mha", ".mhd", ".img", ".hdr", ".dcm")),
    ("SceneFile", None, (".mrml", ".mrb")),
    ("TransformFile", "vtkMRMLTransformNode", (".h5", ".tfm", ".mat", ".txt")),
    ("SegmentationFile", "vtkMRMLSegmentationNode", (".seg.nrrd", ".seg.nhdr")),
    ("ModelFile", "vtkMRMLModelNode", (".vtk", ".vtp", ".stl", ".ply", ".obj")),
    ("TableFile", "vtkMRMLTableNode", (".csv", ".tsv")),
    ("TextFile", "vtkMRMLTextNode", (".txt", ".json", ".xml")),
    ("MarkupsFile", "vtkMRMLMarkupsNode", (".mrk.json", ".fcsv")),
    ("ColorTableFile", "vtkMRMLColorNode", (".ctbl",)),
)

_CREATES = {
    "TransformFile": "vtkMRMLTransformNode",
    "SegmentationFile": "vtkMRMLSegmentationNode",
    "ModelFile": "vtkMRMLModelNode",
    "TableFile": "vtkMRMLTableNode",
    "TextFile": "vtkMRMLTextNode",
    "ColorTableFile": "vtkMRMLColorTableNode",
}


class CoreIOManager:
    def fileType(self, name):
        name = str(name).lower()
        fitting = [(len(e), kind) for kind, _, extensions in TYPES for e in extensions if name.endswith(e)]
        return max(fitting, default=(0, "NoFile"))[1]

    def fileWriterFileType(self, node):
        if node.IsA("vtkMRMLScene"):
            return "SceneFile"
        return next((kind for kind, cls, _ in TYPES if cls and node.IsA(cls)), "NoFile")

    def fileWriterExtensions(self, node):
        storage = node.CreateDefaultStorageNode()
        storage.UnRegister(None)
        types = storage.GetSupportedWriteFileTypes()
        return tuple(types.GetValue(i) for i in range(types.GetNumberOfValues()))

    def extractKnownExtension(self, name, node):
        storage = node.CreateDefaultStorageNode()
        storage.UnRegister(None)
        return storage.GetSupportedFileExtension(name)

    # ---- loading ---

    def loadNodes(self, kind, properties, loaded=None, messages=None):
        name = properties["fileName"]
        if not os.path.exists(name):
            return False
        nodes = self._load(kind, name, properties, messages)
        for node in nodes or ():
            if loaded is not None:
                loaded.AddItem(node)
        return nodes is not None

    def _load(self, kind, name, properties, messages):
        if kind == "SceneFile":
            return [] if self._load_scene(name, properties.get("clear", False)) else None
        if kind == "VolumeFile":
            return self._load_volume(name, properties)
        cls = _CREATES.get(kind)
        if cls is None:
            return None
        node = slicer.mrmlScene.AddNewNodeByClass(cls, properties.get("name") or _base_name(name))
        node.AddDefaultStorageNode(name)
        storage = node.GetStorageNode()
        if not storage or not storage.ReadData(node):
            _copy_messages(storage, messages)
            slicer.mrmlScene.RemoveNode(node)
            return None
        return [node]

    def _load_volume(self, name, properties):
        options = 0
        if properties.get("labelmap"):
            options |= 1
        if properties.get("center"):
            options |= 2
        if properties.get("singleFile"):
            options |= 4
        node = slicer.modules.volumes.logic().AddArchetypeVolume(
            name, properties.get("name") or _base_name(name), options
        )
        if node is None:
            return None
        if properties.get("show", True):
            selection = slicer.app.applicationLogic().GetSelectionNode()
            if node.IsA("vtkMRMLLabelMapVolumeNode"):
                selection.SetActiveLabelVolumeID(node.GetID())
            else:
                selection.SetActiveVolumeID(node.GetID())
            slicer.app.applicationLogic().PropagateVolumeSelection()
        return [node]

    def _load_scene(self, name, clear):
        scene = slicer.mrmlScene
        if name.lower().endswith(".mrb"):
            return bool(scene.ReadFromMRB(name, clear))
        scene.SetURL(name)
        return bool(scene.Connect() if clear else scene.Import())

    def loadScene(self, name, properties=None):
        return self._load_scene(str(name), (properties or {}).get("clear", True))

    # ---- saving ---

    def saveNodes(self, kind, properties, messages=None):
        name = str(properties["fileName"])
        if kind == "SceneFile":
            return self._save_scene(name)
        node = slicer.mrmlScene.GetNodeByID(properties["nodeID"])
        if node is None:
            return False
        if node.GetStorageNode() is None:
            node.AddDefaultStorageNode(name)
        storage = node.GetStorageNode()
        if storage is None:
            return False
        storage.SetFileName(name)
        if "useCompression" in properties:
            storage.SetUseCompression(properties["useCompression"])
        ok = bool(storage.WriteData(node))
        _copy_messages(storage, messages)
        return ok

    def exportNodes(self, ids, names, properties, harden=False, messages=None):
        if harden:
            raise NotImplementedError("The stand-in host does not export in the world coordinate system")
        ok = True
        for node_id, name in zip(ids, names):
            node = slicer.mrmlScene.GetNodeByID(node_id)
            storage = node.CreateDefaultStorageNode()
            storage.UnRegister(None)
            storage.SetFileName(str(name))
            ok = bool(storage.WriteData(node)) and ok
            _copy_messages(storage, messages)
        return ok

    def _save_scene(self, name):
        scene = slicer.mrmlScene
        if name.lower().endswith(".mrml"):
            scene.SetURL(name)
            scene.SetRootDirectory(os.path.dirname(os.path.abspath(name)))
            return bool(scene.Commit())
        if name.lower().endswith(".mrb"):
            return bool(scene.WriteToMRB(name))
        os.makedirs(name, exist_ok=True)
        return bool(slicer.app.applicationLogic().SaveSceneToSlicerDataBundleDirectory(name, None))

    def registeredFileReaderCount(self, kind):
        return int(any(kind == t[0] for t in TYPES))


def _base_name(name):
    base = os.path.basename(name)
    known = sorted((e for _, _, extensions in TYPES for e in extensions), key=len, reverse=True)
    return next((base[: -len(e)] for e in known if base.lower().endswith(e)), base)


def _copy_messages(storage, messages):
    if storage is not None and messages is not None:
        messages.AddMessages(storage.GetUserMessages())

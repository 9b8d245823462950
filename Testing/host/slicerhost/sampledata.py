"""The module `SampleData`: the registry of sources. There is no network.

A source with a `customDownloader` is loaded by a click on its button in Slicer; a test calls
``source.customDownloader(source)``, which is what the button does.
"""

import sys
import types

import slicer


class SampleDataSource:
    """One data set; as in Slicer, all lists have to be of one length."""

    def __init__(
        self,
        sampleName=None,
        sampleDescription=None,
        uris=None,
        fileNames=None,
        nodeNames=None,
        checksums=None,
        loadFiles=None,
        customDownloader=None,
        thumbnailFileName=None,
        loadFileTypes=None,
        loadFileProperties=None,
    ):
        if isinstance(uris, str):
            uris, fileNames, nodeNames = [uris], [fileNames], [nodeNames]
            loadFiles, loadFileTypes, checksums = [loadFiles], [loadFileTypes], [checksums]
        elif isinstance(uris, (list, tuple)):
            empty = [None] * len(uris)
            if loadFileTypes is None or isinstance(loadFileTypes, str):
                loadFileTypes = [loadFileTypes] * len(uris)
            nodeNames, loadFiles, checksums = nodeNames or empty, loadFiles or empty, checksums or empty
        self.sampleName = sampleName
        self.sampleDescription = sampleName if sampleDescription is None else sampleDescription
        self.uris, self.fileNames, self.nodeNames = uris, fileNames, nodeNames
        self.loadFiles, self.loadFileTypes, self.checksums = loadFiles, loadFileTypes, checksums
        self.customDownloader, self.thumbnailFileName = customDownloader, thumbnailFileName
        self.loadFileProperties = loadFileProperties or {}
        lengths = {len(v) for v in (uris, fileNames, nodeNames, loadFiles, loadFileTypes, checksums)}
        if len(lengths) > 1:
            raise ValueError(f"All fields of sample data source must have the same length\n{vars(self)}")

    def __eq__(self, other):
        return isinstance(other, SampleDataSource) and vars(self) == vars(other)

    __hash__ = None


class SampleDataLogic:
    builtInCategoryName = "BuiltIn"
    developmentCategoryName = "Development"

    def __init__(self, logMessage=None):
        self.logMessage = logMessage or (lambda message, level=0: print(message))

    @staticmethod
    def registerCustomSampleDataCategory(category, title):
        slicer.modules.sampleDataSourceCategories.setdefault(category, {})["title"] = title

    @staticmethod
    def registerCustomSampleDataSource(
        category="Custom",
        sampleName=None,
        uris=None,
        fileNames=None,
        nodeNames=None,
        customDownloader=None,
        thumbnailFileName=None,
        loadFileTypes=None,
        loadFiles=None,
        loadFileProperties=None,
        checksums=None,
    ):
        source = SampleDataSource(
            sampleName=sampleName,
            uris=uris,
            fileNames=fileNames,
            nodeNames=nodeNames,
            thumbnailFileName=thumbnailFileName,
            loadFileTypes=loadFileTypes,
            loadFiles=loadFiles,
            loadFileProperties=loadFileProperties,
            checksums=checksums,
            customDownloader=customDownloader,
        )
        sources = slicer.modules.sampleDataSources.setdefault(category, [])
        if source not in sources:
            sources.append(source)

    @staticmethod
    def sampleDataSourcesByCategory(category=None):
        sources = slicer.modules.sampleDataSources
        return sources if category is None else sources.get(category, [])

    @staticmethod
    def isSampleDataSourceRegistered(category, sampleDataSource):
        if not isinstance(sampleDataSource, SampleDataSource):
            raise TypeError(f"unsupported sampleDataSource type '{type(sampleDataSource)}'")
        return sampleDataSource in slicer.modules.sampleDataSources.get(category, [])

    @staticmethod
    def categoryTitle(category):
        return slicer.modules.sampleDataSourceCategories.get(category, {}).get("title", category)

    def sourceForSampleName(self, sampleName):
        for sources in slicer.modules.sampleDataSources.values():
            for source in sources:
                if source.sampleName == sampleName:
                    return source
        return None

    def downloadFromSource(self, source, maximumAttemptsCount=3, forceDownload=False):
        """Slicer downloads the URIs here: only a click on the source's button calls its customDownloader."""
        raise RuntimeError(f"The stand-in host has no network: cannot download {source.uris}")

    def downloadSample(self, sampleName):
        return self.downloadSamples(sampleName)[0]

    def downloadSamples(self, sampleName):
        source = self.sourceForSampleName(sampleName)
        return self.downloadFromSource(source) if source else []


def downloadSample(sampleName):
    return SampleDataLogic().downloadSample(sampleName)


def downloadSamples(sampleName):
    return SampleDataLogic().downloadSamples(sampleName)


def install():
    slicer.modules.sampleDataSources = {}
    slicer.modules.sampleDataSourceCategories = {}
    module = types.ModuleType("SampleData")
    for item in (SampleDataSource, SampleDataLogic, downloadSample, downloadSamples):
        setattr(module, item.__name__, item)
    sys.modules["SampleData"] = module

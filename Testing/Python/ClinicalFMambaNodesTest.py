"""Volume nodes to arrays and back, transforms, result nodes; no worker, no torch."""

import ast
import json
import sys
import tempfile
import unittest
from pathlib import Path

import numpy as np
import slicer
import vtk
from clinicalfmamba_selftest import addTransform, addVolume, addWarp, ijkOf, run, sampled, smooth, snapshot, worldOf
from ClinicalFMambaPanel import display, result_nodes, sample_data, volume_nodes
from ClinicalFMambaPanel.process import inTurns
from ClinicalFMambaPanel.report import writeReport
from ClinicalFMambaPanel.signals import Signal
from ClinicalFMambaPanel.words import durationInWords, inThePanel

TRANSFORMS = {
    "none": lambda: None,
    "shift": lambda: addTransform("shift", shift=(3.0, -2.0, 1.5)),
    "turn": lambda: addTransform("turn", shift=(1.0, 2.0, -3.0), angle=8.0),
    "warp": lambda: addWarp("warp"),
}


def exhaust(generator):
    steps = 0
    for _ in generator:
        steps += 1
    return steps


class NodeTestCase(unittest.TestCase):
    def setUp(self):
        slicer.mrmlScene.Clear()
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)

    def path(self, name="x.npy"):
        return Path(self.folder.name) / name


class Reading(NodeTestCase):
    def test_array_round_trip(self):
        for array in (
            smooth((5, 6, 7)),
            smooth((5, 6, 7)).astype(np.float32),
            smooth((5, 6, 7)).astype(np.uint16),
            smooth((5, 6, 7)).astype(np.float64),
            np.arange(5 * 6 * 7 * 3, dtype=np.uint8).reshape(5, 6, 7, 3),
        ):
            with self.subTest(type=array.dtype, shape=array.shape):
                node = addVolume("A", array)
                exhaust(volume_nodes.writeArray(node, self.path()))
                np.testing.assert_array_equal(np.load(self.path()), array)
                image = inTurns(volume_nodes.readImage(self.path()))
                node.SetAndObserveImageData(image)
                np.testing.assert_array_equal(slicer.util.arrayFromVolume(node), array)
                self.assertEqual(slicer.util.arrayFromVolume(node).dtype, array.dtype)

    def test_alpha_is_dropped(self):
        rgba = np.arange(2 * 3 * 4 * 4, dtype=np.uint8).reshape(2, 3, 4, 4)
        node = addVolume("A", rgba)
        self.assertEqual(volume_nodes.problemOf(node, "A"), "")
        exhaust(volume_nodes.writeArray(node, self.path()))
        np.testing.assert_array_equal(np.load(self.path()), rgba[..., :3])

    def test_large_volumes_are_handed_over_in_steps(self):
        node = addVolume("A", np.zeros((16, 512, 512), np.float32))
        self.assertEqual(exhaust(volume_nodes.writeArray(node, self.path())), 4)

    def test_a_full_disk_is_an_error_and_not_the_end(self):
        if not Path("/dev/full").exists():
            self.skipTest("no device that is always full on this system")
        a, b = addVolume("A"), addVolume("B")
        for generator in (volume_nodes.writeArray(a, "/dev/full"), volume_nodes.writeMovedArray(a, b, "/dev/full")):
            with self.assertRaisesRegex(OSError, "No space left"):
                exhaust(generator)

    def test_problems(self):
        empty = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "nothing")
        self.assertIn("nothing) is empty", volume_nodes.problemOf(empty, "A"))
        two = addVolume("two", np.zeros((2, 3, 4, 2), np.uint8))
        self.assertIn("2 values", volume_nodes.problemOf(two, "A"))
        wide = addVolume("wide", np.zeros((2, 3, 4, 3), np.int16))
        self.assertIn("3 values of type short", volume_nodes.problemOf(wide, "A"))
        self.assertEqual(volume_nodes.problemOf(addVolume("A"), "A"), "")
        flat = addVolume("flat")
        squeeze = vtk.vtkMatrix4x4()
        squeeze.SetElement(2, 2, 0.0)
        transform = addTransform("squeeze")
        transform.SetMatrixTransformToParent(squeeze)
        flat.SetAndObserveTransformNodeID(transform.GetID())
        self.assertIn("flat in space", volume_nodes.problemOf(flat, "A"))
        for className, kind in (
            ("vtkMRMLLabelMapVolumeNode", "LabelMapVolume"),
            ("vtkMRMLSegmentationNode", "Segmentation"),
            ("vtkMRMLModelNode", "Model"),
        ):
            node = slicer.mrmlScene.AddNewNodeByClass(className, "other")
            self.assertIn(f"B (other) is no image but a {kind}", volume_nodes.problemOf(node, "B"))
        grey = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "rgb")
        grey.SetAndObserveImageData(addVolume("colour", np.zeros((2, 3, 4, 3), np.uint8)).GetImageData())
        self.assertIn("no vector volume", volume_nodes.problemOf(grey, "A"))

    def test_modality_from_dicom(self):
        node = addVolume("volume")
        self.assertEqual(volume_nodes.modalityOf(node), "")
        hierarchy = slicer.mrmlScene.GetSubjectHierarchyNode()
        for tag, modality in (("CT", "CT"), ("MR", "MR"), ("NM", "SPECT"), ("PT", "PET"), ("US", "")):
            hierarchy.SetItemAttribute(hierarchy.GetItemByDataNode(node), "DICOM.Modality", tag)
            self.assertEqual(volume_nodes.modalityOf(node), modality)

    def test_displayed_window(self):
        node = addVolume("A")
        node.GetDisplayNode().AutoWindowLevelOff()
        node.GetDisplayNode().SetWindowLevelMinMax(-5, 80)
        self.assertEqual(volume_nodes.displayedWindow(node), (-5, 80))


class Grids(NodeTestCase):
    def place(self, transformA, transformB, angleB=5.0):
        a = addVolume("A")
        b = addVolume("B", smooth((24, 34, 44), 1), (1.3, 1.1, 1.9), (-22.0, -17.0, -12.0), angleB)
        for node, transform in ((a, TRANSFORMS[transformA]()), (b, TRANSFORMS[transformB]())):
            if transform is not None:
                node.SetAndObserveTransformNodeID(transform.GetID())
        return a, b

    def test_geometry_is_that_of_the_world(self):
        for transform in ("none", "shift", "turn"):
            with self.subTest(transform=transform):
                a, b = self.place("none", transform)
                grid = volume_nodes.relate(a, b).b
                corners = np.array([(0, 0, 0), (43, 0, 0), (0, 33, 0), (0, 0, 23), (11, 7, 5)])
                lps = corners @ grid.ijkToLps[:3, :3].T + grid.ijkToLps[:3, 3]
                np.testing.assert_allclose(lps * (-1, -1, 1), worldOf(b, corners), atol=1e-9)
                for_worker = grid.forWorker()
                axes = np.reshape(for_worker["direction"], (3, 3)) * for_worker["spacing"]
                np.testing.assert_allclose(axes, grid.ijkToLps[:3, :3], atol=1e-12)

    def test_difference_counts_transforms(self):
        a, b = addVolume("A"), addVolume("B", seed=1)
        self.assertEqual(volume_nodes.relate(a, b).difference, "")
        shift = addTransform("shift", shift=(3, 0, 0))
        b.SetAndObserveTransformNodeID(shift.GetID())
        self.assertIn("origins 3.0 mm apart", volume_nodes.relate(a, b).difference)
        a.SetAndObserveTransformNodeID(shift.GetID())
        self.assertEqual(volume_nodes.relate(a, b).difference, "")
        warp = addWarp("warp")
        b.SetAndObserveTransformNodeID(warp.GetID())
        self.assertIn("non-linear", volume_nodes.relate(a, b).difference)
        self.assertTrue(volume_nodes.relate(a, b).warped)
        a.SetAndObserveTransformNodeID(warp.GetID())
        self.assertEqual(volume_nodes.relate(a, b).difference, "")

    def test_b_is_moved_to_where_a_is(self):
        """In every combination of transforms, against an interpolation written here."""
        points = np.random.default_rng(0).integers(3, (37, 27, 17), (200, 3))
        for transformA in TRANSFORMS:
            for transformB in TRANSFORMS:
                with self.subTest(a=transformA, b=transformB):
                    slicer.mrmlScene.Clear()
                    a, b = self.place(transformA, transformB)
                    exhaust(volume_nodes.writeMovedArray(b, a, self.path()))
                    moved = np.load(self.path())
                    expected = sampled(slicer.util.arrayFromVolume(b), ijkOf(b, worldOf(a, points)))
                    inside = np.isfinite(expected)
                    self.assertGreater(inside.sum(), 100)
                    got = moved[points[:, 2], points[:, 1], points[:, 0]][inside]
                    self.assertLess(np.abs(got - expected[inside]).max(), 1.01)

    def test_transform_that_is_dragged_while_b_is_moved(self):
        """Never some slices here and some there: B is where the transform leaves it in the end."""
        warp, shift = addWarp("warp"), addTransform("shift", shift=(2, 0, 0))
        a, b = addVolume("A"), addVolume("B", seed=1)
        a.SetAndObserveTransformNodeID(warp.GetID())
        b.SetAndObserveTransformNodeID(shift.GetID())
        steps = volume_nodes.writeMovedArray(b, a, self.path())
        for _ in range(8):
            next(steps)
        moved = vtk.vtkMatrix4x4()
        moved.SetElement(1, 3, 5.0)
        shift.SetMatrixTransformToParent(moved)
        exhaust(steps)
        exhaust(volume_nodes.writeMovedArray(b, a, self.path("again.npy")))
        np.testing.assert_array_equal(np.load(self.path()), np.load(self.path("again.npy")))

    def test_linear_transforms_through_the_engine_agree(self):
        """What the worker does with the geometry is what vtkImageReslice does with the transforms."""
        from ClinicalFMambaLib.volumes import Volume, resample_onto

        for transformA in ("none", "shift", "turn"):
            for transformB in ("none", "shift", "turn"):
                with self.subTest(a=transformA, b=transformB):
                    slicer.mrmlScene.Clear()
                    a, b = self.place(transformA, transformB)
                    pair = volume_nodes.relate(a, b)
                    exhaust(volume_nodes.writeMovedArray(b, a, self.path()))
                    array = slicer.util.arrayFromVolume(b)
                    geometry = {key: tuple(value) for key, value in pair.b.forWorker().items()}
                    moved = resample_onto(Volume(array, **geometry), pair.a.asVolume()).array
                    inner = (slice(2, -2),) * 3
                    self.assertLess(np.abs(moved[inner].astype(int) - np.load(self.path())[inner]).max(), 2)

    def test_outside_of_a_moved_ct_is_air(self):
        a = addVolume("A")
        b = addVolume("CT", smooth((20, 30, 40)) - 1000)
        b.SetAndObserveTransformNodeID(addTransform("far", shift=(1000, 0, 0)).GetID())
        exhaust(volume_nodes.writeMovedArray(b, a, self.path(), "CT"))
        self.assertEqual(set(np.unique(np.load(self.path()))), {-1024})


class Writing(NodeTestCase):
    def event(self, a, b, **parts):
        window = {"low": 0.0, "high": 1000.0, "text": "0 to 1000"}
        provenance = {
            "notice": "Research use only, not for diagnosis.",
            "software": {"name": "ClinicalFMamba", "version": "0"},
            "date_utc": "2026-01-01",
            "inputs": {
                "a": {"name": a.GetName(), "modality": "MR", "size_xyz": [40, 30, 20], "window": window},
                "b": {"name": b.GetName(), "modality": "CT", "size_xyz": [40, 30, 20], "window": window},
            },
            "model": {"name": "mri-ct-2d", "sha256": "ab"},
            "device": {"name": "cpu", "reason": "a <test>"},
            "output": {"scale": "1000 x network output"},
            "warnings": ["B looks shifted"],
            "seconds": 1.5,
        }
        return {
            "colour": False,
            "display_range": [0, 1000],
            "provenance": provenance,
            "metrics": {"EN": 4.5, "SSIM": 0.75},
            "metrics_note": "measured on 3 slices",
            "classification": None,
            **parts,
        }

    def put(self, a, b, output=None, array=None, name="fused", **parts):
        array = smooth((20, 30, 40), 2) if array is None else array
        np.save(self.path(), array)
        image = inTurns(volume_nodes.readImage(self.path()))
        event = self.event(a, b, **parts)
        place = result_nodes.Place.of(a)
        output = result_nodes.putVolume(output, image, place, a, event, name)
        result_nodes.putResults(output, a, b, event)
        return output

    def test_geometry_transform_and_window(self):
        a, b = addVolume("A", angle=12), addVolume("B")
        turn = addTransform("turn", angle=5)
        a.SetAndObserveTransformNodeID(turn.GetID())
        fused = self.put(a, b)
        np.testing.assert_allclose(volume_nodes.matrixOf(fused), volume_nodes.matrixOf(a))
        self.assertIs(fused.GetParentTransformNode(), turn)
        self.assertEqual(fused.GetClassName(), "vtkMRMLScalarVolumeNode")
        shown = fused.GetDisplayNode()
        self.assertEqual((shown.GetWindowLevelMin(), shown.GetWindowLevelMax()), (0, 1000))
        self.assertFalse(shown.GetAutoWindowLevel())
        self.assertEqual(fused.GetAttribute("ClinicalFMamba.model"), "mri-ct-2d")
        self.assertIn("not for diagnosis", fused.GetAttribute("ClinicalFMamba.notice"))

    def test_colour(self):
        a, b = addVolume("A"), addVolume("B")
        rgb = np.repeat(smooth((20, 30, 40))[..., None] // 5, 3, axis=-1).astype(np.uint8)
        fused = self.put(a, b, array=rgb, colour=True, display_range=[0, 255])
        self.assertEqual(fused.GetClassName(), "vtkMRMLVectorVolumeNode")
        self.assertEqual(fused.GetVoxelVectorType(), fused.VoxelVectorTypeColorRGB)
        np.testing.assert_array_equal(slicer.util.arrayFromVolume(fused), rgb)

    def test_second_result_updates_the_first(self):
        a, b = addVolume("A"), addVolume("B")
        fused = self.put(a, b)
        nodes = snapshot()
        difference = inTurns(result_nodes.putDifference(fused)).GetID()
        again = self.put(a, b, fused, smooth((20, 30, 40), 3), metrics={"EN": 1.0})
        self.assertIs(again, fused)
        np.testing.assert_array_equal(slicer.util.arrayFromVolume(fused), smooth((20, 30, 40), 3))
        self.assertEqual(result_nodes.resultsOf(fused).metrics, (("EN", 1.0),))
        # The difference to the result before is gone, with what shows it.
        self.assertIsNone(fused.GetNodeReference(result_nodes.DIFFERENCE))
        self.assertIsNone(slicer.mrmlScene.GetNodeByID(difference))
        self.assertEqual(snapshot(), nodes)

    def test_name_says_what_is_in_it(self):
        a, b = addVolume("A"), addVolume("B")
        fused, other = self.put(a, b, name="A + B"), self.put(a, b, name="A + B")
        self.assertNotEqual(other.GetName(), "A + B")
        given = other.GetName()
        self.assertEqual(self.put(a, b, other, name="A + B").GetName(), given)
        self.put(a, b, fused, name="A + C")
        self.assertEqual(fused.GetName(), "A + C")
        self.assertEqual(fused.GetNodeReference(result_nodes.METRICS).GetName(), "A + C metrics")
        fused.SetName("mine")
        self.assertEqual(self.put(a, b, fused, name="A + D").GetName(), "mine")
        made = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "Fused")
        self.assertEqual(self.put(a, b, made, name="A + D").GetName(), "Fused")

    def test_a_copy_does_not_share_what_belongs_to_the_result(self):
        a, b = addVolume("A"), addVolume("B")
        fused = self.put(a, b)
        copy = slicer.modules.volumes.logic().CloneVolume(slicer.mrmlScene, fused, "copy")
        self.assertEqual(len(result_nodes.companionsOf(fused)), 2)
        self.assertEqual(result_nodes.companionsOf(copy), [])
        self.assertEqual(result_nodes.companionsOf(a), [])
        self.put(a, b, copy, metrics={"EN": 1.0})
        self.assertEqual(result_nodes.resultsOf(copy).metrics, (("EN", 1.0),))
        self.assertEqual(result_nodes.resultsOf(fused).metrics, (("EN", 4.5), ("SSIM", 0.75)))

    def test_under_the_study_of_a(self):
        a, b = addVolume("A"), addVolume("B")
        hierarchy = slicer.mrmlScene.GetSubjectHierarchyNode()
        patient = hierarchy.CreateSubjectItem(hierarchy.GetSceneItemID(), "Doe")
        study = hierarchy.CreateStudyItem(patient, "Head")
        item = hierarchy.GetItemByDataNode(a)
        hierarchy.SetItemParent(item, study)
        hierarchy.SetItemAttribute(item, "DICOM.Modality", "MR")
        hierarchy.SetItemAttribute(item, "DICOM.FrameOfReferenceUID", "1.2.3")
        fused = self.put(a, b)
        mine = hierarchy.GetItemByDataNode(fused)
        self.assertEqual(hierarchy.GetItemParent(mine), study)
        self.assertEqual(hierarchy.GetItemAttribute(mine, "DICOM.Modality"), "MR")
        self.assertEqual(hierarchy.GetItemAttribute(mine, "DICOM.FrameOfReferenceUID"), "1.2.3")
        self.assertIn("fused", hierarchy.GetItemAttribute(mine, "DICOM.SeriesDescription"))
        for role in (result_nodes.PROVENANCE, result_nodes.METRICS):
            node = fused.GetNodeReference(role)
            self.assertEqual(hierarchy.GetItemParent(hierarchy.GetItemByDataNode(node)), mine)

    def test_results_can_be_read_again(self):
        a, b = addVolume("A"), addVolume("B")
        classification = {
            "model": "grade",
            "probabilities": [{"label": "low", "probability": 0.25}, {"label": "high", "probability": 0.75}],
            "note": "one model",
        }
        fused = self.put(a, b, classification=classification)
        results = result_nodes.resultsOf(fused)
        self.assertEqual(results.provenance["model"]["name"], "mri-ct-2d")
        self.assertEqual(results.metrics, (("EN", 4.5), ("SSIM", 0.75)))
        self.assertEqual(results.metricsNote, "measured on 3 slices")
        self.assertEqual(results.classification, (("low", 0.25), ("high", 0.75)))
        self.assertEqual(results.classificationNote, "grade; one model")
        self.assertIs(fused.GetNodeReference(result_nodes.VOLUME_A), a)
        self.assertIs(fused.GetNodeReference(result_nodes.VOLUME_B), b)
        self.assertEqual(result_nodes.resultsOf(a), result_nodes.Results())
        self.assertEqual(result_nodes.resultsOf(None), result_nodes.Results())
        self.put(a, b, fused)
        self.assertEqual(result_nodes.resultsOf(fused).classification, ())

    def test_difference(self):
        a, b = addVolume("A"), addVolume("B")
        fused = self.put(a, b)
        difference = inTurns(result_nodes.putDifference(fused))
        expected = smooth((20, 30, 40), 2).astype(int) - slicer.util.arrayFromVolume(a)
        self.assertLessEqual(np.abs(slicer.util.arrayFromVolume(difference) - expected).max(), 1)
        self.assertIs(inTurns(result_nodes.putDifference(fused)), difference)
        # Another fusion has ended in between.
        steps = result_nodes.putDifference(fused)
        next(steps)
        self.put(a, b, fused)
        with self.assertRaisesRegex(ValueError, "changed meanwhile"):
            exhaust(steps)
        with self.assertRaisesRegex(ValueError, "no result"):
            inTurns(result_nodes.putDifference(a))
        slicer.mrmlScene.RemoveNode(a)
        with self.assertRaisesRegex(ValueError, "no longer in the scene"):
            inTurns(result_nodes.putDifference(fused))

    def test_difference_has_its_colours_also_after_a_scene_was_closed(self):
        for _ in range(2):
            slicer.mrmlScene.Clear()
            difference = inTurns(result_nodes.putDifference(self.put(*self.pair())))
            colours = difference.GetDisplayNode().GetColorNode()
            self.assertEqual(colours.GetNumberOfColors(), 256)
            colour = [0.0] * 4
            colours.GetColor(255, colour)
            np.testing.assert_allclose(colour, (1.0, 0.3, 0.2, 1.0), atol=0.01)
        another = inTurns(result_nodes.putDifference(self.put(*self.pair())))
        self.assertIs(another.GetDisplayNode().GetColorNode(), colours)

    @staticmethod
    def pair():
        return addVolume("A"), addVolume("B")

    def test_report(self):
        a, b = addVolume("A & co"), addVolume("B", smooth((24, 34, 44), 1), (1.3, 1.1, 1.9), angle=5)
        fused = self.put(a, b)
        results = result_nodes.resultsOf(fused)
        page = self.path("report.html")
        writeReport(fused, results, page)
        text = page.read_text(encoding="utf-8")
        for words in (
            "not for diagnosis",
            "mri-ct-2d",
            "A &amp; co",
            "a &lt;test&gt;",
            "B looks shifted",
            "EN",
            "0.75",
        ):
            self.assertIn(words, text)
        self.assertIn("data:image/png;base64,", text)
        data = self.path("report.json")
        writeReport(fused, results, data)
        content = json.loads(data.read_text(encoding="utf-8"))
        self.assertEqual(content["metrics"]["EN"], 4.5)
        self.assertEqual(content["provenance"]["model"]["sha256"], "ab")
        with self.assertRaisesRegex(ValueError, r"\.html or a \.json"):
            writeReport(fused, results, self.path("report.docx"))
        with self.assertRaisesRegex(ValueError, "no result"):
            writeReport(a, result_nodes.resultsOf(a), page)
        with self.assertRaises(OSError):
            writeReport(fused, results, self.path("nowhere") / "report.html")


class Views(NodeTestCase):
    def test_fused_alone_then_over(self):
        a, b = addVolume("A"), addVolume("B")
        composites = [
            node
            for node in slicer.util.getNodesByClass("vtkMRMLSliceCompositeNode")
            if node.GetLayoutName() not in display.COMPARE_VIEWS
        ]
        display.showOver(a, b, 0.5)
        for node in composites:
            self.assertEqual((node.GetBackgroundVolumeID(), node.GetForegroundVolumeID()), (a.GetID(), b.GetID()))
            self.assertEqual((node.GetForegroundOpacity(), node.GetCompositing()), (0.5, node.Alpha))
        display.showAlone(b)
        for node in composites:
            self.assertEqual((node.GetBackgroundVolumeID(), node.GetForegroundVolumeID()), (b.GetID(), None))

    def test_compare(self):
        if slicer.app.layoutManager() is None:
            self.skipTest("no slice views without a main window")
        nodes = [addVolume(name) for name in ("A", "fused", "B")]
        before = slicer.app.layoutManager().layout
        display.compare(*nodes)
        self.assertTrue(display.isComparing())
        for name, node in zip(display.COMPARE_VIEWS, nodes):
            composite = slicer.mrmlScene.GetSingletonNode(name, "vtkMRMLSliceCompositeNode")
            self.assertEqual(composite.GetBackgroundVolumeID(), node.GetID())
            self.assertTrue(composite.GetLinkedControl())
        display.leaveComparison()
        self.assertEqual(slicer.app.layoutManager().layout, before)

    def test_zoom_stays_on_what_is_looked_at(self):
        manager = slicer.app.layoutManager()
        if manager is None:
            self.skipTest("no slice views without a main window")
        a, b, fused, other = (addVolume(name) for name in ("A", "B", "fused", "other"))
        fused.SetNodeReferenceID(result_nodes.VOLUME_A, a.GetID())
        difference = addVolume("difference")
        difference.SetNodeReferenceID(result_nodes.RESULT, fused.GetID())
        red = manager.sliceWidget("Red").mrmlSliceNode()

        def zoomed(show, *arguments):
            red.SetFieldOfView(7, 5, 1)
            show(*arguments)
            return red.GetFieldOfView()[:2] == (7, 5)

        display.showAlone(a)
        self.assertTrue(zoomed(display.showAlone, fused))
        self.assertTrue(zoomed(display.showAlone, fused))
        self.assertTrue(zoomed(display.showOver, a, difference, 0.6))
        self.assertFalse(zoomed(display.showAlone, other))
        self.assertFalse(zoomed(display.showAlone, fused))
        display.compare(a, fused, b)
        view = manager.sliceWidget(display.COMPARE_VIEWS[1]).mrmlSliceNode()
        view.SetFieldOfView(7, 5, 1)
        display.compare(a, fused, b)
        self.assertEqual(view.GetFieldOfView()[:2], (7, 5))
        display.leaveComparison()

    def test_scene_that_was_saved_while_comparing(self):
        manager = slicer.app.layoutManager()
        if manager is None:
            self.skipTest("no slice views without a main window")
        # Since the application has started, so that the scene of a colleague shows, too.
        self.assertTrue(manager.layoutLogic().GetLayoutNode().IsLayoutDescription(display.COMPARE_LAYOUT))
        before = manager.layout
        display.compare(*(addVolume(name) for name in ("A", "fused", "B")))
        path = str(self.path("scene.mrb"))
        self.assertTrue(slicer.util.saveScene(path))
        display.leaveComparison()
        slicer.mrmlScene.Clear()
        slicer.util.loadScene(path)
        self.assertTrue(display.isComparing())
        for name, volume in zip(display.COMPARE_VIEWS, ("A", "fused", "B")):
            shown = manager.sliceWidget(name).mrmlSliceCompositeNode().GetBackgroundVolumeID()
            self.assertEqual(slicer.mrmlScene.GetNodeByID(shown).GetName(), volume)
        display.leaveComparison()
        manager.setLayout(before)


class SampleDataTest(NodeTestCase):
    def test_slicer_without_that_module(self):
        hidden, sys.modules["SampleData"] = sys.modules.get("SampleData"), None
        try:
            sample_data.register()
        finally:
            del sys.modules["SampleData"]
            if hidden is not None:
                sys.modules["SampleData"] = hidden

    def test_phantom_is_registered_and_made_here(self):
        sample_data.register()
        # After the module was reloaded.
        download, sample_data.download = sample_data.download, lambda source: download(source)
        try:
            sample_data.register()
        finally:
            sample_data.download = download
        sources = slicer.modules.sampleDataSources[sample_data.CATEGORY]
        self.assertEqual([source.sampleName for source in sources], [sample_data.SAMPLE])
        self.assertTrue(Path(sources[0].thumbnailFileName).is_file())
        # As the button of the Sample Data module does it.
        nodes = sources[0].customDownloader(sources[0])
        self.assertEqual([node.GetName() for node in nodes], [f"Phantom {name}" for name in sample_data.SHOWN])
        hierarchy = slicer.mrmlScene.GetSubjectHierarchyNode()
        items = [hierarchy.GetItemByDataNode(node) for node in nodes]
        self.assertEqual(len({hierarchy.GetItemParent(item) for item in items}), 1)
        self.assertEqual([volume_nodes.modalityOf(node) for node in nodes], ["CT", "MR", "MR", "SPECT"])
        self.assertEqual(nodes[0].GetImageData().GetDimensions(), (128, 128, 128))
        # The head's top is up and its nose is in front: the tumour is where the phantom says it is, left frontal.
        from ClinicalFMambaLib.phantom import LABELS, make_phantom

        labels = make_phantom(32)["labels"]
        self.assertTrue((np.isin(labels.array, LABELS["necrosis"])).any())
        a = sample_data.addPhantom(32)[1]
        place = np.argwhere(labels.array == LABELS["necrosis"]).mean(axis=0)[::-1]
        right, front, _up = worldOf(a, [place])[0]
        self.assertLess(right, 0)
        self.assertGreater(front, 0)


class Small(unittest.TestCase):
    def test_signal(self):
        got = []
        signal = Signal("test")
        signal.connect(lambda value: 1 / 0)
        signal.connect(got.append)
        signal.connect(got.append)
        signal.emit(1)
        signal.disconnect(got.append)
        signal.emit(2)
        self.assertEqual(got, [1])

    def test_no_message_sends_the_user_to_the_command_line(self):
        """Neither what the engine says now nor what somebody adds to it."""
        import ClinicalFMambaLib

        folder = Path(ClinicalFMambaLib.__file__).parent
        found = 0
        for path in [folder / "volumes.py", folder / "config.py", *sorted((folder / "inference").glob("*.py"))]:
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                for text in ast.walk(node) if isinstance(node, (ast.Raise, ast.Assign, ast.Return)) else ():
                    value = getattr(text, "value", None)
                    if isinstance(text, ast.Constant) and isinstance(value, str) and " --" in f" {value}":
                        found += 1
                        self.assertNotRegex(inThePanel(value), r"--\w", f"{path.name}: see words.py")
        self.assertGreater(found, 3)
        self.assertEqual(
            inThePanel("fusing needs torch>=2.4, which cannot be imported (x); install with: pip install 'torch>=2.4'"),
            "fusing needs torch>=2.4, which cannot be imported (x); "
            'reinstall PyTorch in the module "PyTorch Utils" and restart Slicer',
        )

    def test_duration(self):
        self.assertEqual(
            [durationInWords(s) for s in (-1, 0.4, 59, 60, 200)], ["0 s", "0 s", "59 s", "1 min 0 s", "3 min 20 s"]
        )


if __name__ == "__main__":
    run(__name__)

"""The report of one result: a page that stands alone, pictures inside, or the provenance as JSON."""

import base64
import html
import json
import tempfile
from pathlib import Path

import numpy as np
import slicer
from slicer.i18n import tr as _

from ClinicalFMambaLib import NOTICE
from ClinicalFMambaLib.files import write_text

from . import result_nodes, volume_nodes
from .process import inTurns

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1c2530; max-width: 62em; margin: 2em auto; padding: 0 1.5em; }
h1 { font-size: 1.5em; margin-bottom: 0.2em; } h2 { font-size: 1.1em; margin-top: 1.8em; }
.notice { background: #fff3d6; border-left: 4px solid #d98a00; padding: 0.6em 1em; font-weight: 600; }
img { max-width: 100%; background: #000; border-radius: 4px; }
table { border-collapse: collapse; } td, th { padding: 0.25em 1.2em 0.25em 0; text-align: left; vertical-align: top; }
tr + tr { border-top: 1px solid #e2e6ea; } th { font-weight: 600; color: #4a5764; }
pre { background: #f4f6f8; padding: 1em; overflow-x: auto; font-size: 12px; border-radius: 4px; }
small { color: #5c6975; }
"""


def writeReport(output, results, path):
    """Write what was done with what to ``path``, in one step.

    Raises:
        ValueError: the node is no result, or the file's name ends in neither .html nor .json.
        OSError: the file cannot be written.
    """
    if results.provenance is None:
        raise ValueError(_("{name} is no result of ClinicalFMamba").format(name=output.GetName()))
    if path.suffix.lower() == ".json":
        content = {
            "volume": output.GetName(),
            "provenance": results.provenance,
            "metrics": dict(results.metrics),
            "metrics_note": results.metricsNote,
            "classification": dict(results.classification),
            "classification_intervals": dict(zip(dict(results.classification), results.intervals)),
            "classification_note": results.classificationNote,
        }
        write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    elif path.suffix.lower() in (".html", ".htm"):
        write_text(path, _page(output, results))
    else:
        raise ValueError(_("a report is a .html or a .json file, not {name}").format(name=path.name))


def _page(output, results):
    provenance = results.provenance
    made = f"ClinicalFMamba {_text(provenance, 'software', 'version')}, {_text(provenance, 'date_utc')}"
    parts = [
        f"<h1>{html.escape(output.GetName())}</h1>",
        f"<p><small>{made}</small></p>",
        f'<p class="notice">{html.escape(NOTICE)}</p>',
        _picture(output, provenance),
    ]
    warnings = provenance.get("warnings") or ()
    if warnings:
        parts.append(f"<h2>{_('Warnings')}</h2><ul>")
        parts += [f"<li>{html.escape(str(warning))}</li>" for warning in warnings]
        parts.append("</ul>")
    rows = [
        (_("Volume A"), _describe(provenance, "a")),
        (_("Volume B"), _describe(provenance, "b")),
        (_("Model"), f"{_text(provenance, 'model', 'name')} (SHA-256 {_text(provenance, 'model', 'sha256')})"),
        (_("Device"), f"{_text(provenance, 'device', 'name')}, {_text(provenance, 'device', 'reason')}"),
        (_("Intensities"), _text(provenance, "output", "scale")),
        (_("Grids"), _text(provenance, "grid_difference") or _("the same")),
        (_("Time"), f"{_text(provenance, 'seconds')} s"),
    ]
    parts += [f"<h2>{_('What was done')}</h2>", _table(rows)]
    if results.classification or results.classificationNote:
        rows = result_nodes.inPercent(results)
        parts += [f"<h2>{_('Tumour classification')}</h2>", _table(rows), _note(results.classificationNote)]
    if results.metrics:
        rows = [(name, f"{value:.4g}") for name, value in results.metrics]
        parts += [f"<h2>{_('Fusion metrics')}</h2>", _table(rows), _note(results.metricsNote)]
    full = html.escape(json.dumps(provenance, indent=2, ensure_ascii=False))
    parts.append(f"<h2>{_('Full provenance')}</h2><pre>{full}</pre>")
    title = html.escape(output.GetName())
    body = "\n".join(parts)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def _text(provenance, *keys):
    value = provenance
    for key in keys:
        value = value.get(key, "") if isinstance(value, dict) else ""
    return html.escape(str(value))


def _describe(provenance, key):
    size = (provenance.get("inputs", {}).get(key, {}) or {}).get("size_xyz") or ()
    words = [
        _text(provenance, "inputs", key, "name"),
        _text(provenance, "inputs", key, "modality"),
        "×".join(str(n) for n in size),
        _("window {window}").format(window=_text(provenance, "inputs", key, "window", "text")),
    ]
    return ", ".join(filter(None, words))


def _table(rows):
    return "<table>" + "".join(f"<tr><th>{name}</th><td>{value}</td></tr>" for name, value in rows) + "</table>"


def _note(note):
    return f"<p><small>{html.escape(note)}</small></p>" if note else ""


def _picture(output, provenance):
    """A, fused, B in three planes as an image inside the page; what is gone or has changed is left out."""
    from ClinicalFMambaLib.errors import ClinicalFMambaError
    from ClinicalFMambaLib.inference.intensity import Window, apply_window
    from ClinicalFMambaLib.preview import save_preview

    def scaled(array, low, high):
        isColour = array.ndim == 4
        result = np.empty((*array.shape[:3], 3) if isColour else array.shape, np.uint8 if isColour else np.float32)
        for slab in volume_nodes.slabsOf(result):
            result[slab] = array[slab][..., :3] if isColour else apply_window(array[slab], Window(low, high))
            yield
        return result

    def windowed(array, key):
        window = provenance["inputs"][key]["window"]
        return inTurns(scaled(array, window["low"], window["high"]))

    panels = [(_("fused"), inTurns(scaled(slicer.util.arrayFromVolume(output), 0, 1000)))]
    a, b = (output.GetNodeReference(role) for role in (result_nodes.VOLUME_A, result_nodes.VOLUME_B))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        try:
            if a is not None and volume_nodes.sizeOf(a) == volume_nodes.sizeOf(output):
                panels.insert(0, (a.GetName(), windowed(slicer.util.arrayFromVolume(a), "a")))
            if b is not None:
                moved = Path(folder) / "b.npy"
                modality = provenance["inputs"]["b"].get("modality", "")
                inTurns(volume_nodes.writeMovedArray(b, output, moved, modality))
                panels.append((b.GetName(), windowed(np.load(moved, mmap_mode="r"), "b")))
            grid = volume_nodes.Grid(
                volume_nodes.sizeOf(output), volume_nodes.LPS_FROM_RAS @ volume_nodes.matrixOf(output)
            ).forWorker()
            path = Path(folder) / "preview.png"
            save_preview(path, panels, grid["spacing"], output.GetName(), direction=grid["direction"])
            data = base64.b64encode(path.read_bytes()).decode()
        except (ClinicalFMambaError, KeyError) as error:
            return f"<p><small>{html.escape(str(error))}</small></p>"
    return f'<p><img alt="A, fused, B in three planes" src="data:image/png;base64,{data}"></p>'

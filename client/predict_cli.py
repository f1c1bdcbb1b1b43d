"""`wardround-site predict`: segment images with a published model, at the site."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from common.inference.trust import add_trust_options

_EPILOG = """\
files in OUT, of an input called NAME:
  NAME_seg.tif | .ome.tif | .nii | .nii.gz | .dcm   the classes, in the input's format (DICOM-SEG for DICOM)
  NAME_objects.tif | .ome.tif | .nii.gz             with --instances: the number of the object at every voxel
  NAME_objects.json                                 with --instances: a mask for each object, run-length encoded
  NAME_overlay.png                                  with --overlay: outlines over the image
  NAME_explain_CLASS.png                            with --explain: where the model saw the class (Grad-CAM)
  measurements.csv                                  volumes, areas and counts, a row a class

docs/predict.md says more.
"""


def add_predict_command(commands: Any) -> None:
    """Adds `predict` to the sub-commands of `wardround-site` (what `add_subparsers` returned)."""
    predict = commands.add_parser(
        "predict",
        help="segment images with a published model",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    predict.add_argument(
        "model", type=Path, metavar="MODEL", help="the folder of a published version, or a .tflite file in it"
    )
    predict.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="image files, folders of images or of DICOM series, or MODALITY=PATH for each image of one case",
    )
    predict.add_argument("--out", type=Path, required=True, metavar="OUT", help="the folder that results go to")
    add_trust_options(predict, has_identity=False)
    predict.add_argument("--variant", metavar="NAME", help="of the model (default: the fastest recommended one)")
    predict.add_argument("--force", action="store_true", help="replace results that exist")
    predict.add_argument("--overlay", action="store_true", help="write pictures of the outlines")
    predict.add_argument(
        "--explain",
        action="store_true",
        help="write pictures of where the model saw each class (needs a version that was published with them)",
    )
    predict.add_argument("--instances", action="store_true", help="write the objects, for a study of instances")
    predict.add_argument(
        "--mirror",
        action=argparse.BooleanOptionalAction,
        help="average over mirror images, which takes 4 times as long in 2D and 8 times in 3D (default: as the study)",
    )
    predict.add_argument(
        "--code",
        action="append",
        default=[],
        metavar="'CLASS=CATEGORY/SCHEME:VALUE:MEANING'",
        help="what a class is in DICOM-SEG, such as 'tumour=abnormal/SCT:108369006:Neoplasm'",
    )
    predict.add_argument(
        "--channel-map",
        "--modality",
        action="append",
        default=[],
        metavar="'NAME=PATTERN'",
        help="a modality and what its series or files have in their names, as for `data add`",
    )
    predict.add_argument("--level", type=int, default=0, metavar="N", help="of the pyramids of TIFF files (default: 0)")
    predict.add_argument("--threads", type=int, metavar="N", help="that the model uses (default: one a core)")
    predict.add_argument("--delegate", type=Path, metavar="LIB", help="a LiteRT delegate, such as one for a GPU")
    predict.add_argument("--json", action="store_true", help="print JSON")
    predict.set_defaults(handler=_predict)


def _predict(options: argparse.Namespace) -> int:
    from client.predict import run  # what reads images takes a while to load

    return run(options)

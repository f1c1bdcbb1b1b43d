"""Every fault a check can find: a stable code, its level, what it is, and how to get out.

A code never changes its meaning and is never used again for another one. `docs/checks.md` has a paragraph for each.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import Enum
from typing import Literal

Level = Literal["error", "warning"]


@dataclass(frozen=True, order=True)
class Finding:
    """One fault, of one file, one case or the whole data set.

    Attributes
    ----------
    code : as in `Code`, such as "E101".
    level : "error" keeps the case out; "warning" does not.
    case : the case's name; "" where the finding is about no one case. An error about no case is about the data set.
    file : the last part of the file's path; "" where the finding is about no one file.
    message : what is wrong and where, in one sentence without the full stop.
    advice : what to do, in whole sentences.

    Case, file and message may name files, and files may be named after patients: none of them leaves the site.
    """

    code: str
    level: Level
    case: str
    file: str
    message: str
    advice: str

    def to_json(self) -> dict[str, str]:
        """A JSON object of the attributes."""
        return asdict(self)


class Code(Enum):
    """Codes with title and advice. E: error, keeps the case out. W: warning. 1xx: one file, 2xx: an image and its
    label, 3xx: one case, 4xx: cases beside each other, 5xx: the folder.
    """

    # One file.
    UNREADABLE = (
        "E101",
        "file damaged, incomplete or of another format",
        "Copy the file again from its source, convert it, or remove it.",
    )
    MISSING_FILE = ("E102", "file does not exist", "Put the file in its place, or register the data again.")
    NOT_A_FILE = ("E103", "no file where one is expected", "Put the image file itself in its place.")
    EMPTY_FILE = ("E104", "file of zero bytes", "Copy the file again from its source, or remove it.")
    NO_PERMISSION = ("E105", "file may not be read", "Give the user that runs the site the right to read it.")
    LINK_LOOP = ("E106", "link that leads back to itself", "Replace the link by the file it was meant for.")
    NOT_TAKEN = (
        "E107",
        "sound file of a kind that is not taken",
        "Convert the file to a grey or RGB TIFF, a NIfTI file or a plain DICOM series, or remove it.",
    )
    NOT_FINITE = (
        "E108",
        "values that are no finite numbers",
        "Export the image again with these voxels filled in.",
    )
    DIMENSIONS = (
        "E109",
        "wrong number of dimensions",
        "Save one slice a file for a 2D study, the whole volume in one file for a 3D study; the coordinator decides "
        "which of the two it is.",
    )
    CHANNELS = (
        "E110",
        "wrong number of channels",
        "Convert the image, or ask the coordinator for a study with these channels (grey serves for 3, RGB of 8 or 16 "
        "bits for 1).",
    )
    CONSTANT_IMAGE = ("E111", "image of one single value", "Export the image again, or remove the case.")
    SLICES = (
        "E112",
        "slices missing, doubled or uneven",
        "Export the whole series again from the archive, or resample it to even slices.",
    )
    SEVERAL_SERIES = (
        "E113",
        "folder of several series where one is expected",
        "Put every series in a folder of its own, or name the wanted series.",
    )
    NO_GEOMETRY = (
        "E114",
        "orientation or spacing that no grid can have",
        "Export the file again with its orientation and spacing.",
    )
    NO_LEVEL = (
        "E115",
        "no such level of a pyramid",
        "Register the data again without --level, or with a level that every image and label has.",
    )
    TOO_LARGE = (
        "E116",
        "more voxels than are taken",
        "Save the image in parts or at a coarser resolution, or register the data with a smaller level of its pyramid.",
    )
    TOO_FINE = (
        "E117",
        "too large at the study's spacing",
        "Check that the study's spacing is in the unit of the image, and that the spacing in the file is right.",
    )
    BURNED_IN = (
        "W120",
        "DICOM flag for annotation burnt into the pixels",
        "Look at the image: text in it may name the patient and misleads training. Remove the case if it does.",
    )
    # An image and its label.
    MISSING_LABEL = ("E201", "no label", "Add the label, or remove the case.")
    LABEL_VALUES = (
        "E202",
        "label values that are negative or no whole numbers",
        "Export the label again as integers of 0 or more, without interpolation.",
    )
    LABEL_CHANNELS = (
        "E203",
        "label of several channels",
        "Save the label as a grey image of class indices or instance numbers, not as colours.",
    )
    UNKNOWN_VALUE = (
        "E204",
        "label value that is no class",
        "Give the value a class in the data set's label map, or correct the label.",
    )
    SHAPE_MISMATCH = ("E205", "label and image of different shapes", "Export the label on the image's grid.")
    SPACING_MISMATCH = ("E206", "label and image of different spacing", "Export the label on the image's grid.")
    AFFINE_MISMATCH = ("E207", "label beside or across its image", "Export the label on the image's grid.")
    NO_FOREGROUND = (
        "E208",
        "all labels empty",
        "Check that the right labels were exported, and the data set's label map.",
    )
    LABEL_TWICE = ("E209", "several labels for one case", "Keep one of them, and move the others away.")
    EMPTY_LABEL = (
        "W220",
        "empty label",
        "Nothing, if there is nothing to see in this image; otherwise draw the label, or remove the case.",
    )
    FULL_LABEL = (
        "W221",
        "label of a single class from edge to edge",
        "Check that the label was exported with its background.",
    )
    LOOKS_LIKE_CLASSES = (
        "W222",
        "class label where instances are expected",
        "Number the objects one by one. A study of instances trains on it as one object.",
    )
    LOOKS_LIKE_INSTANCES = (
        "W223",
        "instance label where classes are expected",
        "Give every object the value of its class; a study of instances takes the label as it is.",
    )
    LOOKS_LIKE_AN_IMAGE = (
        "W224",
        "label that looks like an image",
        "Check that it is no image, and was not exported in shades of grey: a label holds one number for each class or "
        "object.",
    )
    # One case.
    MISSING_MODALITY = ("E301", "modality missing", "Add the image of this modality, or remove the case.")
    NO_OVERLAP = (
        "E302",
        "modalities that show different places",
        "Check that the images are of one examination and one patient, and export them again.",
    )
    ABSENT_MODALITY = (
        "W320",
        "modality missing, trained on as zeros",
        "Nothing, if it was never taken; otherwise add the image.",
    )
    OTHER_GRID = (
        "W321",
        "modalities on different grids",
        "Nothing: they are resampled. Register the images to each other if the patient moved between them.",
    )
    SAME_MODALITY = (
        "W322",
        "one image given as two modalities",
        "Check which of the two modalities it is, and correct the other.",
    )
    # Cases beside each other.
    DUPLICATE = ("E401", "image and label of another case", "Remove one of the two cases.")
    CONTRADICTION = (
        "E402",
        "one image with different labels",
        "Keep the case with the right label; remove the others.",
    )
    PATIENT_IN_BOTH = (
        "E403",
        "patient in training and validation",
        "Make the split again: all cases of a patient belong on one side.",
    )
    TOO_FEW = ("E404", "fewer cases than the study asks for", "Correct the cases that are kept out, or add more.")
    SAME_LABEL = (
        "W420",
        "one label on different images",
        "Check that the label was drawn on this image; nothing, if the images show the same place.",
    )
    SHARED_IMAGE = (
        "W421",
        "image that another case has too",
        "Check that the image belongs to this case.",
    )
    INTENSITY_OUTLIER = (
        "W422",
        "brightness or contrast far from the others",
        "Look at the image: it may be of another device, inverted, or badly exposed.",
    )
    SPACING_OUTLIER = (
        "W423",
        "spacing far from the others",
        "Check the spacing in the file: a wrong one misleads resampling and every distance.",
    )
    # The folder.
    UNREADABLE_FOLDER = ("E501", "folder that cannot be listed", "Check the path and the rights of its folders.")
    NO_CASES = (
        "E502",
        "no cases found",
        "Arrange the folder as the guide says, such as images/ and labels/ with files of the same names.",
    )
    NAME_TWICE = ("E503", "two files for one image", "Keep one of them, and move the other away.")
    TABLE = (
        "E504",
        "fault in the table of cases",
        "Correct the table: a first row of column names, then a row for each case, separated by commas, in UTF-8.",
    )
    LABEL_WITHOUT_IMAGE = ("W520", "label without an image", "Add the image of the same name, or remove the label.")
    IGNORED_FILE = ("W521", "file of a kind that is not read", "Convert it, or move it out of the folder.")
    LEFT_OUT = (
        "W522",
        "series left out for another",
        "Nothing, if the other is the one that is meant; otherwise say which with --channel-map 'NAME=PATTERN'.",
    )
    FOLDER_LEFT_OUT = (
        "W523",
        "folder of images left out",
        "Add it under a name of its own, or move its images to the others.",
    )
    NO_SUCH_LABEL = (
        "W524",
        "pattern for labels that chooses none",
        "Register the data again with a --label that the labels' names match, or without one.",
    )

    def __init__(self, code: str, title: str, advice: str) -> None:
        self.code = code
        self.title = title
        self.advice = advice

    @property
    def level(self) -> Level:
        """The code's first letter says it."""
        return "error" if self.code.startswith("E") else "warning"

    def finding(self, message: str, *, case: str = "", file: str = "", advice: str = "") -> Finding:
        """A finding of this code, with the code's advice unless there is a better one."""
        return Finding(self.code, self.level, case, file, message, advice or self.advice)


BY_CODE = {code.code: code for code in Code}

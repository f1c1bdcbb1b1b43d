"""A case: the images of one examination, by modality, and the label that was drawn on them; where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True, order=True)
class Source:
    """Where one image or label lies.

    Attributes
    ----------
    path : a file, or the folder that holds the files of a DICOM series.
    series : the SeriesInstanceUID of the wanted series where `path` is a folder; "" where the folder holds one alone,
        and for files.
    level : of the file's pyramid, 0 for the full resolution, which every file has.
    """

    path: Path
    series: str = ""
    level: int = 0

    @property
    def name(self) -> str:
        """The last part of the path: what messages call it."""
        return self.path.name


@dataclass(frozen=True)
class Case:
    """What is trained on as one: images on one grid and their label.

    Attributes
    ----------
    name : unique at the site.
    patient : whose images they are: cases of one patient are never split between training and validation. The case's
        own name where nothing is known.
    images : by modality; the one image of a study without modalities has the modality "".
    label : None where there is none.

    Name, patient and paths never leave the site.
    """

    name: str
    patient: str
    images: dict[str, Source]
    label: Source | None

    @property
    def sources(self) -> list[Source]:
        """Every source of the case: the images in order of their modalities, then the label."""
        images = [self.images[modality] for modality in sorted(self.images)]
        return [*images, self.label] if self.label is not None else images

    def with_modalities(self, modalities: Sequence[str]) -> Case:
        """The case with its images under a study's names for them, whatever the case of letters; others are left out.

        A study without modalities takes the one image that there is, and one with a single modality an image without
        any.
        """
        if not modalities:
            image = self.images.get("") or (next(iter(self.images.values())) if len(self.images) == 1 else None)
            return replace(self, images={"": image} if image else {})
        by_name = {modality.casefold(): source for modality, source in self.images.items()}
        if len(modalities) == 1 and set(self.images) == {""}:
            by_name = {modalities[0].casefold(): self.images[""]}
        found = {modality: by_name[modality.casefold()] for modality in modalities if modality.casefold() in by_name}
        return replace(self, images=found)

"""What a study must know of each network before it is built: which images it takes and which sizes fit it.

Kept apart from the networks themselves (`common.models`), because checking a study loads no TensorFlow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class NetworkTraits:
    """One network's demands on its study.

    Attributes
    ----------
    dimensions : values of `task.dimensions` that it can be built for.
    fixed_stride : how much smaller its coarsest features are than the image; None where `model.depth` says it.
    deepest : the largest `model.depth` that it takes; networks of a fixed stride do not read the key.
    encoders : values of `model.encoder` that it can be built with; () where it has none to choose.
    """

    dimensions: tuple[int, ...] = (2, 3)
    fixed_stride: int | None = None
    deepest: int = 6
    encoders: tuple[str, ...] = ()

    def stride(self, depth: int) -> int:
        """What every size of a patch or tile must be a multiple of, with `depth` halvings asked for."""
        return 2**depth if self.fixed_stride is None else self.fixed_stride


NETWORKS: Mapping[str, NetworkTraits] = {
    "unet": NetworkTraits(),
    "residual_unet": NetworkTraits(),
    "attention_unet": NetworkTraits(),
    # What is smaller than 10 pixels is less than one after more than two halvings.
    "dilated_unet": NetworkTraits(deepest=2),
    # Their encoders are made for images: 3D depthwise convolutions neither train fast on CPUs nor quantize.
    "deeplabv3plus": NetworkTraits(dimensions=(2,), fixed_stride=16, encoders=("mobilenetv3", "xception")),
    "mobilenetv3_small": NetworkTraits(dimensions=(2,), fixed_stride=16),
}
"""Every network that `model.name` can name, in the order in which they are listed to users."""

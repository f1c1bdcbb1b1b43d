"""The sites' data as TFF programs see it: handles that name a site and a round; the data stays where it is."""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow_federated as tff

from server.federation import SiteData


class SiteDataSource(tff.program.FederatedDataSource):  # type: ignore[misc]
    """The data of all sites of a cohort.

    Parameters
    ----------
    sites : the cohort.
    federated_type : the type of what the sites hold, {B*}@CLIENTS.
    """

    def __init__(self, sites: Sequence[str], federated_type: tff.FederatedType) -> None:
        self._sites = tuple(sites)
        self._type = federated_type

    @property
    def federated_type(self) -> tff.FederatedType:
        """The type of what a selection stands for."""
        return self._type

    def iterator(self) -> SiteDataIterator:
        """Selections from round 1 on."""
        return SiteDataIterator(self._sites, self._type, 1)


class SiteDataIterator(tff.program.FederatedDataSourceIterator):  # type: ignore[misc]
    """Selects the whole cohort, once a round."""

    def __init__(self, sites: Sequence[str], federated_type: tff.FederatedType, following: int) -> None:
        self._sites = tuple(sites)
        self._type = federated_type
        self._next = following

    @property
    def federated_type(self) -> tff.FederatedType:
        """The type of what a selection stands for."""
        return self._type

    def select(self, k: int | None = None) -> list[SiteData]:
        """The handles of the next round. Raises ValueError if `k` is not the number of sites."""
        if k is not None and k != len(self._sites):
            raise ValueError(f"expected all {len(self._sites)} sites, found k={k}")
        number, self._next = self._next, self._next + 1
        return [SiteData(site, number) for site in self._sites]

    def to_bytes(self) -> bytes:
        """The position, sites and type."""
        type_bytes: bytes = tff.types.serialize_type(self._type).SerializeToString()
        head = "\0".join([str(self._next), *self._sites]).encode()
        return len(head).to_bytes(4, "little") + head + type_bytes

    @classmethod
    def from_bytes(cls, buffer: bytes) -> SiteDataIterator:
        """The iterator that `to_bytes` described."""
        length = int.from_bytes(buffer[:4], "little")
        following, *sites = buffer[4 : 4 + length].decode().split("\0")
        proto = tff.types.serialize_type(tff.FederatedType((), tff.CLIENTS)).__class__.FromString(buffer[4 + length :])
        return cls(sites, tff.types.deserialize_type(proto), int(following))

"""Answers of NVIDIA's driver about the cards: memory, and who holds it. Needs neither TensorFlow nor a driver.

Nothing here raises because of the driver: no driver, no permission or a lost card are answers, with their reason.
Cards are numbered as in NVML, by PCI bus id. `NvmlAnswer.for_tensorflow` finds the one that TensorFlow calls GPU:n.
"""

from __future__ import annotations

import importlib
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import tenacity

logger = logging.getLogger(__name__)

_TRIES = 3
_WAIT_SECONDS = 0.1
_TRANSIENT = (
    "NVML_ERROR_TIMEOUT",
    "NVML_ERROR_IRQ_ISSUE",
    "NVML_ERROR_IN_USE",
    "NVML_ERROR_NOT_READY",
    "NVML_ERROR_INSUFFICIENT_SIZE",  # a process started between the two calls that list processes
    "NVML_ERROR_UNKNOWN",
)


@dataclass(frozen=True, slots=True)
class NvmlProcess:
    """A process on a card, by the host's pid. ``name`` or ``used_bytes`` is None where the driver does not give it."""

    pid: int
    name: str | None
    used_bytes: int | None


@dataclass(frozen=True, slots=True)
class NvmlCard:
    """A card, or one MIG instance of a card.

    ``mig_parent_uuid`` is the card's UUID for an instance, and None for a card. ``mig_enabled`` is True for a card
    that is split up: CUDA programs get its instances, never the card. ``processes`` is None where the driver would not
    list them.
    """

    index: int
    name: str
    uuid: str
    pci_bus_id: str
    total_bytes: int
    free_bytes: int
    used_bytes: int
    processes: tuple[NvmlProcess, ...] | None = ()
    mig_enabled: bool = False
    mig_parent_uuid: str | None = None


@dataclass(frozen=True, slots=True)
class NvmlAnswer:
    """Every card that answered.

    ``reason`` says why there are none, or which one did not answer; it is "" if all is well. ``environ`` holds the
    environment variables that decide which cards CUDA shows, and in which order.
    """

    cards: tuple[NvmlCard, ...] = ()
    reason: str = ""
    environ: Mapping[str, str] = field(default_factory=dict, repr=False)

    def for_tensorflow(self, device: str, *, device_name: str | None = None) -> NvmlCard | None:
        """Return the card that TensorFlow's *physical* device ``device`` ("GPU:0") is; None if that is uncertain.

        ``device_name`` is TensorFlow's name for the card's model. It decides where cards of several models are built in
        and CUDA_DEVICE_ORDER leaves their order to CUDA.
        """
        index = int(device.rpartition(":")[2])
        visible = visible_cards(self.cards, self.environ)
        card = visible[index] if index < len(visible) else None
        if _order_is_known(self.cards, self.environ):
            return card
        if device_name is None:
            return None
        named = [each for each in visible if each.name == device_name]
        return named[0] if len(named) == 1 else None


def devices(library: ModuleType | None = None, *, sleep: Callable[[float], None] = time.sleep) -> NvmlAnswer:
    """Ask the driver about every card.

    ``library`` stands in for the ``pynvml`` module, ``sleep`` for the pause between tries.
    """
    environ = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    if library is None:
        try:
            library = importlib.import_module("pynvml")
        except ImportError:
            return NvmlAnswer(reason="the package nvidia-ml-py is not installed", environ=environ)
    return _Library(library, sleep).ask(environ)


def visible_cards(cards: tuple[NvmlCard, ...], environ: Mapping[str, str]) -> tuple[NvmlCard, ...]:
    """Return the cards that CUDA shows to a process with this environment, in CUDA's order.

    ``CUDA_VISIBLE_DEVICES`` is read by CUDA's rules: its entries are indices, or unique beginnings of UUIDs. The first
    entry that names nothing hides the rest. A card that is named twice hides all.
    """
    # CUDA numbers whole cards first, and shows at most one MIG instance where nothing is selected.
    whole = [card for card in cards if card.mig_parent_uuid is None and not card.mig_enabled]
    instances = [card for card in cards if card.mig_parent_uuid is not None]
    numbered = whole or instances[:1]
    text = environ.get("CUDA_VISIBLE_DEVICES")
    if text is None:
        return tuple(numbered)
    chosen: list[NvmlCard] = []
    for entry in (part.strip() for part in text.split(",")):
        if entry.isdecimal():
            named = numbered[int(entry) : int(entry) + 1]
        elif entry.startswith(("GPU-", "MIG-")):
            named = [card for card in (*whole, *instances) if card.uuid.startswith(entry)]
        else:
            named = []
        if len(named) != 1:
            break
        if named[0] in chosen:
            return ()
        chosen += named
    return tuple(chosen)


_VARIABLES = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")


def _order_is_known(cards: tuple[NvmlCard, ...], environ: Mapping[str, str]) -> bool:
    entries = environ.get("CUDA_VISIBLE_DEVICES", "")
    return (
        environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
        or entries.startswith(("GPU-", "MIG-"))
        # CUDA's own order is fastest first, and among equal cards that of the bus.
        or len({card.name for card in cards if card.mig_parent_uuid is None}) <= 1
    )


class _Library:
    """Wrapper around ``pynvml`` that tries again after passing errors, and turns lasting ones into answers."""

    def __init__(self, library: ModuleType, sleep: Callable[[float], None]) -> None:
        self._nvml: Any = library
        self._error: type[Exception] = library.NVMLError
        self._transient = {getattr(library, name) for name in _TRANSIENT if hasattr(library, name)}
        self._retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(_TRIES),
            wait=tenacity.wait_fixed(_WAIT_SECONDS),
            retry=tenacity.retry_if_exception(self._is_transient),
            reraise=True,
            sleep=sleep,
        )

    def ask(self, environ: Mapping[str, str]) -> NvmlAnswer:
        try:
            self._call("nvmlInit")
        except self._error as error:
            return NvmlAnswer(reason=self._reason("NVML does not start", error), environ=environ)
        try:
            return self._ask_all(environ)
        finally:
            try:
                self._nvml.nvmlShutdown()
            except self._error as error:
                logger.debug("nvmlShutdown failed: %s", error)

    def _ask_all(self, environ: Mapping[str, str]) -> NvmlAnswer:
        try:
            count = int(self._call("nvmlDeviceGetCount"))
        except self._error as error:
            return NvmlAnswer(reason=self._reason("NVML counts no cards", error), environ=environ)
        cards: list[NvmlCard] = []
        reasons: list[str] = []
        for index in range(count):
            try:
                handle = self._call("nvmlDeviceGetHandleByIndex", index)
                cards += self._card_and_instances(index, handle)
            except self._error as error:
                reasons.append(self._reason(f"card {index} does not answer", error))
        if not count:
            reasons.append("the driver sees no card")
        return NvmlAnswer(tuple(cards), "; ".join(reasons), environ)

    def _card_and_instances(self, index: int, handle: object) -> list[NvmlCard]:
        mig_enabled = self._mig_enabled(handle)
        card = self._card(index, handle, mig_enabled=mig_enabled)
        cards = [card]
        if mig_enabled:
            for number in range(int(self._call("nvmlDeviceGetMaxMigDeviceCount", handle))):
                try:
                    instance = self._call("nvmlDeviceGetMigDeviceHandleByIndex", handle, number)
                    cards.append(self._card(index, instance, parent=card))
                except self._error as error:
                    logger.debug("no MIG instance %d on card %d: %s", number, index, error)
        return cards

    def _card(
        self, index: int, handle: object, *, mig_enabled: bool = False, parent: NvmlCard | None = None
    ) -> NvmlCard:
        memory = self._call("nvmlDeviceGetMemoryInfo", handle)
        return NvmlCard(
            index=index,
            name=_text(self._call("nvmlDeviceGetName", handle)),
            uuid=_text(self._call("nvmlDeviceGetUUID", handle)),
            pci_bus_id=parent.pci_bus_id if parent else _text(self._call("nvmlDeviceGetPciInfo", handle).busId),
            total_bytes=int(memory.total),
            free_bytes=int(memory.free),
            used_bytes=int(memory.used),
            processes=self._processes(handle),
            mig_enabled=mig_enabled,
            mig_parent_uuid=parent.uuid if parent else None,
        )

    def _processes(self, handle: object) -> tuple[NvmlProcess, ...] | None:
        found: dict[int, NvmlProcess] = {}
        answered = False
        for function in ("nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetGraphicsRunningProcesses"):
            try:
                listed = self._call(function, handle)
            except self._error as error:
                logger.debug("%s: %s", function, error)
                continue
            answered = True
            for process in listed:
                used = process.usedGpuMemory
                found[process.pid] = NvmlProcess(process.pid, self._process_name(process.pid), used)
        return tuple(sorted(found.values(), key=lambda each: -(each.used_bytes or 0))) if answered else None

    def _process_name(self, pid: int) -> str | None:
        try:
            return _text(self._call("nvmlSystemGetProcessName", pid)) or None
        except self._error:
            return None  # it has ended, lives in another container, or is another user's
        except UnicodeDecodeError:
            return None  # the driver cuts names off in the middle of a character

    def _mig_enabled(self, handle: object) -> bool:
        try:
            current, _ = self._call("nvmlDeviceGetMigMode", handle)
        except self._error:
            return False  # a card that knows no MIG
        return bool(current)

    def _call(self, function: str, *args: object) -> Any:
        return self._retrying(getattr(self._nvml, function), *args)

    def _is_transient(self, error: BaseException) -> bool:
        return isinstance(error, self._error) and getattr(error, "value", None) in self._transient

    def _reason(self, what: str, error: Exception) -> str:
        return f"{what}: {error}"


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value

"""NVML through a stand-in for pynvml (there may be no driver), and the real answer where there is none."""

from __future__ import annotations

import types
from dataclasses import replace

import pytest

from autobatch.memory import nvml
from autobatch.memory.nvml import NvmlAnswer, NvmlCard, NvmlProcess, devices, visible_cards

GIB = 2**30


class FakeError(Exception):
    def __init__(self, value: int) -> None:
        super().__init__(f"error {value}")
        self.value = value


def fake_pynvml(cards=(), *, fails=None, mig=None) -> types.ModuleType:
    """``fails``: function name -> list of error codes to raise before it works (a code of -1 stays for ever)."""
    library = types.ModuleType("pynvml")
    fails = {name: list(codes) for name, codes in (fails or {}).items()}
    calls: list[str] = []

    def function(name, result):
        def call(*args):
            calls.append(name)
            codes = fails.get(name)
            if codes:
                code = codes[0] if codes[0] < 0 else codes.pop(0)
                raise FakeError(abs(code))
            return result(*args)

        return call

    def index_of(handle):
        return handle if isinstance(handle, int) else handle[0]

    def memory(handle):
        return types.SimpleNamespace(total=80 * GIB, free=70 * GIB - index_of(handle) * GIB, used=10 * GIB)

    def process(pid, used):
        return types.SimpleNamespace(pid=pid, usedGpuMemory=used)

    library.NVMLError = FakeError
    library.NVML_ERROR_TIMEOUT = 10
    library.NVML_ERROR_IN_USE = 19
    functions = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: len(cards),
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetMemoryInfo": memory,
        "nvmlDeviceGetName": lambda handle: cards[index_of(handle)].encode(),
        "nvmlDeviceGetUUID": lambda handle: f"GPU-{handle}" if isinstance(handle, int) else f"MIG-{handle[1]}",
        "nvmlDeviceGetPciInfo": lambda handle: types.SimpleNamespace(busId=b"0000:%02x:00.0" % handle),
        "nvmlDeviceGetComputeRunningProcesses": lambda handle: [process(7, GIB), process(8, 3 * GIB)],
        "nvmlDeviceGetGraphicsRunningProcesses": lambda handle: [process(9, None)],
        "nvmlSystemGetProcessName": lambda pid: b"/usr/bin/python3",
        "nvmlDeviceGetMigMode": lambda handle: (1, 1) if mig else (0, 0),
        "nvmlDeviceGetMaxMigDeviceCount": lambda handle: 2,
        "nvmlDeviceGetMigDeviceHandleByIndex": lambda handle, number: (handle, number),
    }
    for name, result in functions.items():
        setattr(library, name, function(name, result))
    library.calls = calls
    return library


def ask(library) -> NvmlAnswer:
    return devices(library, sleep=lambda seconds: None)


def test_a_card_is_read_whole():
    answer = ask(fake_pynvml(["NVIDIA H100"]))
    assert answer.reason == ""
    assert answer.cards == (
        NvmlCard(
            index=0,
            name="NVIDIA H100",
            uuid="GPU-0",
            pci_bus_id="0000:00:00.0",
            total_bytes=80 * GIB,
            free_bytes=70 * GIB,
            used_bytes=10 * GIB,
            processes=(
                NvmlProcess(8, "/usr/bin/python3", 3 * GIB),
                NvmlProcess(7, "/usr/bin/python3", GIB),
                NvmlProcess(9, "/usr/bin/python3", None),
            ),
        ),
    )


def test_what_is_transient_is_tried_again():
    library = fake_pynvml(["A"], fails={"nvmlInit": [10], "nvmlDeviceGetMemoryInfo": [19, 10]})
    assert len(ask(library).cards) == 1
    assert library.calls.count("nvmlDeviceGetMemoryInfo") == 3


def test_what_stays_is_not_tried_for_ever():
    library = fake_pynvml(["A"], fails={"nvmlInit": [-10]})
    assert ask(library).reason == "NVML does not start: error 10"
    assert library.calls == ["nvmlInit"] * 3


def test_what_is_not_transient_is_not_tried_again():
    library = fake_pynvml(["A"], fails={"nvmlInit": [-4]})
    assert ask(library) == replace(NvmlAnswer(reason="NVML does not start: error 4"), environ=ask(library).environ)
    assert library.calls.count("nvmlInit") == 2  # once an answer


def test_a_lost_card_leaves_the_others():
    answer = ask(fake_pynvml(["A", "A"], fails={"nvmlDeviceGetMemoryInfo": [15]}))
    assert [card.index for card in answer.cards] == [1]
    assert answer.reason == "card 0 does not answer: error 15"


def test_no_permission_for_processes_is_not_the_same_as_none():
    fails = {"nvmlDeviceGetComputeRunningProcesses": [-4], "nvmlDeviceGetGraphicsRunningProcesses": [-4]}
    assert ask(fake_pynvml(["A"], fails=fails)).cards[0].processes is None


def test_a_process_without_a_name():
    card = ask(fake_pynvml(["A"], fails={"nvmlSystemGetProcessName": [-6]})).cards[0]
    assert {process.name for process in card.processes} == {None}


def test_no_card():
    assert ask(fake_pynvml([])).reason == "the driver sees no card"


def test_nvml_is_shut_down_even_when_it_fails():
    library = fake_pynvml(["A"], fails={"nvmlDeviceGetCount": [-999], "nvmlShutdown": [-1]})
    assert "counts no cards" in ask(library).reason
    assert library.calls[-1] == "nvmlShutdown"


def test_the_real_driver_or_its_absence_is_an_answer():
    answer = devices()
    assert answer.cards or answer.reason


def test_mig_instances_stand_beside_their_card():
    answer = ask(fake_pynvml(["A100"], mig=True))
    assert [(card.uuid, card.mig_enabled, card.mig_parent_uuid) for card in answer.cards] == [
        ("GPU-0", True, None),
        ("MIG-0", False, "GPU-0"),
        ("MIG-1", False, "GPU-0"),
    ]
    # CUDA shows the first instance alone, unless another one is named.
    assert [card.uuid for card in visible_cards(answer.cards, {})] == ["MIG-0"]
    assert [card.uuid for card in visible_cards(answer.cards, {"CUDA_VISIBLE_DEVICES": "MIG-1"})] == ["MIG-1"]


def card(index: int, name: str = "A", uuid: str | None = None) -> NvmlCard:
    return NvmlCard(index, name, uuid or f"GPU-{index}abc", f"0000:0{index}:00.0", 80 * GIB, 70 * GIB, 10 * GIB)


THREE = (card(0), card(1), card(2))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("-1", []),
        ("2,0", [2, 0]),
        ("0,7,1", [0]),
        ("1,-1,2", [1]),
        ("1,1", []),
        ("GPU-2", [2]),
        ("GPU-1abc,GPU-0", [1, 0]),
        ("GPU-", []),
        ("NoDevFiles", []),
    ],
)
def test_cuda_visible_devices(text, expected):
    environ = {} if text is None else {"CUDA_VISIBLE_DEVICES": text}
    assert [each.index for each in visible_cards(THREE, environ)] == expected


def test_tensorflows_number_is_that_among_the_visible():
    answer = NvmlAnswer(THREE, environ={"CUDA_VISIBLE_DEVICES": "2,1"})
    assert answer.for_tensorflow("GPU:0") == THREE[2]
    assert answer.for_tensorflow("GPU:1") == THREE[1]
    assert answer.for_tensorflow("GPU:2") is None


def test_among_cards_of_several_models_the_order_must_be_known():
    cards = (card(0, "T4"), card(1, "H100"))
    assert NvmlAnswer(cards).for_tensorflow("GPU:0") is None
    assert NvmlAnswer(cards).for_tensorflow("GPU:0", device_name="H100") == cards[1]
    assert NvmlAnswer(cards, environ={"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}).for_tensorflow("GPU:0") == cards[0]
    assert NvmlAnswer(cards, environ={"CUDA_VISIBLE_DEVICES": "GPU-1"}).for_tensorflow("GPU:0") == cards[1]


def test_the_variables_are_read_when_the_question_is_asked(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    answer = ask(fake_pynvml(["A", "A"]))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert answer.for_tensorflow("GPU:0").index == 1


def test_without_the_package(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(nvml.importlib, "import_module", missing)
    assert devices().reason == "the package nvidia-ml-py is not installed"

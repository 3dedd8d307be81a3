"""Files made to harm: code that wants to run, bombs, cycles, and damage at random.

Each attack is a builder of bytes. The expectation is always the same: CheckpointError or one of its kind, soon,
in little memory, and nothing run. That nothing ran is proven in a process of its own, where an audit hook ends
the process at the first sign of code: a process, a socket, an import after the reader's own, a file opened to
write, or exec and compile.
"""

from __future__ import annotations

import io
import json
import pickle
import random
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from te_export.checkpoint import read_checkpoint
from te_export.errors import CheckpointError, UntrustedPickleError

MAGIC = (
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}X\r\x00\x00\x00little_endian\x88s."
)


def in_zip(pickle_bytes: bytes, compression: int = zipfile.ZIP_STORED, **records: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("m/data.pkl", pickle_bytes)
        archive.writestr("m/byteorder", "little")
        for key, data in records.items():
            archive.writestr(f"m/data/{key.lstrip('_')}", data)
    return buffer.getvalue()


def in_legacy(pickle_bytes: bytes) -> bytes:
    return MAGIC + pickle_bytes + b"\x80\x02]."


class Calls:
    """Pickles as a call of a function with arguments."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self._call


def stack_global(module: str, qualname: str) -> bytes:
    """A call of a name that protocol 4 spells as two texts."""
    texts = (b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, qualname))
    return b"\x80\x04" + b"".join(texts) + b"\x93N\x85R."


def names_of_calls(canary: Path) -> dict[str, tuple[bytes, str]]:
    """Pickles that run code in pickle.load, with the name that gives each away."""
    import builtins
    import importlib
    import os
    import runpy
    import shutil

    touch = f"open({str(canary)!r}, 'w').close()"
    inner = pickle.dumps(Calls(exec, touch))
    return {
        "os.system": (pickle.dumps(Calls(os.system, f"touch {canary}")), f"{os.system.__module__}.system"),
        "exec": (pickle.dumps(Calls(exec, touch)), "builtins.exec"),
        "exec, protocol 0": (pickle.dumps(Calls(exec, touch), 0), "builtins.exec"),
        "eval": (pickle.dumps(Calls(eval, touch)), "builtins.eval"),
        "subprocess": (pickle.dumps(Calls(subprocess.call, ["touch", str(canary)])), "subprocess.call"),
        "import": (pickle.dumps(Calls(importlib.import_module, "this")), "importlib.import_module"),
        "runpy": (pickle.dumps(Calls(runpy.run_path, str(canary))), "runpy.run_path"),
        "open": (pickle.dumps(Calls(builtins.open, str(canary), "w")), "open"),
        "rmtree": (pickle.dumps(Calls(shutil.rmtree, str(canary.parent))), "shutil.rmtree"),
        "getattr chain": (
            pickle.dumps(Calls(getattr, Calls(importlib.import_module, "os"), "system")),
            "builtins.getattr",
        ),
        "nested pickle": (pickle.dumps(Calls(pickle.loads, inner)), "_pickle.loads"),
        "nested torch.save": (
            b"\x80\x02ctorch.storage\n_load_from_bytes\nC" + bytes([len(inner)]) + inner + b"\x85R.",
            "torch.storage._load_from_bytes",
        ),
        "torch.load": (pickle.dumps(Calls(torch.load, str(canary), None)), "torch.serialization.load"),
        "torch.hub": (b"ctorch.hub\nload\n(Vowner/repo\nVmodel\ntR.", "torch.hub.load"),
        "INST": (f"(Vtouch {canary}\nios\nsystem\n.".encode(), "os.system"),
        "OBJ": (f"(cos\nsystem\nVtouch {canary}\no.".encode(), "os.system"),
        "dotted name": (stack_global("torch", "hub.os.system"), "torch.hub.os.system"),
        "dotted name in torch.nn": (
            stack_global("torch.nn", "modules.os.path.exists"),
            "torch.nn.modules.os",
        ),
        "space in the name": (stack_global("torch.nn x", "Linear"), "torch.nn x.Linear"),
        "lookalike package": (stack_global("torch.nnx", "Linear"), "torch.nnx.Linear"),
        "name from the memo": (
            b"\x80\x04\x8c\x02os\x94\x8c\x06system\x940h\x00h\x01\x93\x8c\x01x\x85R.",
            "os.system",
        ),
        "extension 1": (b"\x82\x01.", "copyreg extension.1"),
        "extension 4": (b"\x84\x01\x00\x00\x00.", "copyreg extension.1"),
        "state of a class": (b"\x80\x02cos\nenviron\n}X\x01\x00\x00\x00aK\x01sb.", "state of a Name"),
        "slots of a class": (b"\x80\x02ctorch\nTensor\nN}X\x01\x00\x00\x00aK\x01s\x86b.", "state of a Name"),
        "setstate of an object": (
            "\x80\x02cos\nsystem\n)\x81X\x05\x00\x00\x00touchb.".encode("latin-1"),
            "os.system",
        ),
        "call of a result": (
            b"cfunctools\npartial\n(cos\nsystem\nVx\ntR(tR.",
            "functools.partial, os.system",
        ),
        "beside weights": (
            pickle.dumps({"state_dict": {}, "config": Calls(os.system, "true")}),
            f"{os.system.__module__}.system",
        ),
    }


CANARY = Path("/tmp/te-export-canary")
CALLS = sorted(names_of_calls(CANARY))


@pytest.mark.parametrize("wrap", [in_zip, in_legacy])
@pytest.mark.parametrize("attack", CALLS)
def test_code_is_refused_by_name_and_not_run(tmp_path, attack, wrap):
    canary = tmp_path / "canary"
    data, name = names_of_calls(canary)[attack]
    path = tmp_path / "model.pt"
    path.write_bytes(wrap(data))
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert name in str(caught.value)
    if "state of a Name" not in name:
        assert isinstance(caught.value, UntrustedPickleError)
        assert "--trust-pickle" in str(caught.value)
    assert not canary.exists()
    assert path.exists()


def test_the_attacks_do_run_in_pickle(tmp_path):
    """Or else the tests above would prove nothing."""
    canary = tmp_path / "canary"
    for attack in ("exec", "exec, protocol 0", "os.system", "nested pickle"):
        pickle.loads(names_of_calls(canary)[attack][0])
        assert canary.exists()
        canary.unlink()


def test_many_names_are_counted(tmp_path):
    data = b"(" + b"".join(b"cevil\nname%d\n" % index for index in range(25)) + b"l."
    path = tmp_path / "model.pt"
    path.write_bytes(in_zip(data))
    with pytest.raises(UntrustedPickleError) as caught:
        read_checkpoint(path)
    assert "evil.name0, evil.name1, evil.name10" in str(caught.value)
    assert " and 15 more." in str(caught.value)


def test_names_cannot_write_to_the_terminal(tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(in_zip(b"cevil\x1b[2J\nname\r" + b"x" * 5000 + b"\n."))
    with pytest.raises(UntrustedPickleError) as caught:
        read_checkpoint(path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


TENSOR = (
    b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000"
    b"X\x03\x00\x00\x00cpu%stQK\x00%s\x89ccollections\nOrderedDict\n)RtR"
)


def state_of(tensor: bytes) -> bytes:
    return b"\x80\x02}X\x01\x00\x00\x00w" + tensor + b"s."


def module(children: bytes) -> bytes:
    return (
        b"ctorch.nn\nModule\n)\x81}(X\x0b\x00\x00\x00_parameters}X\x08\x00\x00\x00_buffers}X\x08\x00\x00\x00_modules"
        + children
        + b"ub"
    )


def circle() -> bytes:
    """A module that is its own child."""
    return (
        b"\x80\x02ctorch.nn\nModule\n)\x81q\x01}(X\x0b\x00\x00\x00_parameters}X\x08\x00\x00\x00_buffers}"
        b"X\x08\x00\x00\x00_modules}X\x01\x00\x00\x00ah\x01sub."
    )


def doubling(levels: int) -> bytes:
    """Each module holds the one before it twice: 2^levels paths."""
    data = b"\x80\x02" + module(b"}") + b"q\x00"
    for level in range(levels):
        before = b"h" + bytes([level])
        data += (
            module(b"}(X\x01\x00\x00\x00a" + before + b"X\x01\x00\x00\x00b" + before + b"u")
            + b"q"
            + bytes([level + 1])
        )
    return data + b"."


def wide_ordered_dicts() -> bytes:
    """A hundred thousand dicts made of one list of a hundred thousand pairs."""
    pair = b"(X\x01\x00\x00\x00kK\x01l"
    start = b"\x80\x02(" + pair * 100_000 + b"l\x85q\x010}("
    made = b"ccollections\nOrderedDict\nh\x01R"
    return start + b"".join(b"J" + index.to_bytes(4, "little") + made for index in range(100_000)) + b"u."


def laughs() -> bytes:
    """Lists of lists of one list: 10^9 leaves."""
    data = b"\x80\x02]q\x00"
    for level in range(9):
        data += b"](" + (b"h" + bytes([level])) * 10 + b"eq" + bytes([level + 1])
    return data + b"."


BOMBS: dict[str, Callable[[], bytes]] = {
    "memo index": lambda: in_zip(b"Nr\xff\xff\xff\xff0]."),
    "text length": lambda: in_zip(b"X\xff\xff\xff\x7fabc."),
    "bytes length": lambda: in_zip(b"\x8e\x00\x00\x00\x00\x00\x01\x00\x00abc."),
    "bytearray length": lambda: in_zip(b"\x80\x05\x96\x00\x00\x00\x00\x00\x01\x00\x00abc."),
    "frame length": lambda: in_zip(b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f]."),
    "integer": lambda: in_zip(b"\x8b\x00\x00\x10\x00" + b"\x01" * (1 << 20) + b"."),
    "decimal": lambda: in_zip(b"I" + b"9" * 60_000 + b"\n."),
    "nested tuples": lambda: in_zip(b"N" + b"\x85" * 300_000 + b"."),
    "nested tuples as a key": lambda: in_zip(b"}N" + b"\x85" * 300_000 + b"Ns."),
    "nested tuples as a key of a key": lambda: in_legacy(b"}K\x01" + b"\x85" * 300_000 + b"\x85Ns."),
    "nested lists as the version": lambda: (
        MAGIC[:17] + b"(" * 100_000 + b"l" * 100_000 + b"." + MAGIC[21:] + b"].]."
    ),
    "nested calls": lambda: in_zip(b"cbuiltins\nset\n" + b")R" * 100_000 + b"."),
    "marks": lambda: in_zip(b"(" * 300_000 + b"."),
    "list in itself": lambda: in_zip(b"]q\x00h\x00a."),
    "dict in itself": lambda: in_zip(b"}q\x00X\x05\x00\x00\x00modelh\x00s."),
    "dict as its own config": lambda: in_zip(
        b"}q\x00(X\x06\x00\x00\x00configh\x00X\x05\x00\x00\x00modelh\x00u."
    ),
    "module in itself": lambda: in_zip(circle()),
    "doubling modules": lambda: in_zip(doubling(60)),
    "billion laughs": lambda: in_zip(laughs()),
    "wide dicts": lambda: in_zip(wide_ordered_dicts()),
    "deflated zeros": lambda: in_zip(
        state_of(TENSOR % (b"J\x00\x00\x00\x02", b"J\x00\x00\x00\x02\x85K\x01\x85")),
        zipfile.ZIP_DEFLATED,
        _0=bytes(1 << 27),
    ),
    "storage of 2^48": lambda: in_zip(
        state_of(
            TENSOR
            % (b"\x8a\x07\x00\x00\x00\x00\x00\x00\x01", b"\x8a\x07\x00\x00\x00\x00\x00\x00\x01\x85K\x01\x85")
        ),
        _0=b"",
    ),
    "stride of zero": lambda: in_zip(
        state_of(TENSOR % (b"K\x01", b"\x8a\x05\x00\x00\x00\x00\x01\x85K\x00\x85")), _0=bytes(4)
    ),
    "location that is no text": lambda: in_zip(b"(X\x07\x00\x00\x00storageNN}K\x01tQ."),
    "persistent id in itself": lambda: in_zip(b"]q\x00h\x00a\x85Q."),
    "central directory of nothing": lambda: b"PK\x03\x04" + bytes(30) + b"PK\x05\x06" + b"\xff" * 18,
    "safetensors header": lambda: (90_000_000).to_bytes(8, "little") + b"{" + bytes(100),
    "safetensors nesting": lambda: (20_000).to_bytes(8, "little") + b'{"a":' + b"[" * 19_995 + bytes(10),
    "html with NULs": lambda: b"<html>" + bytes(100),
}


@pytest.fixture(scope="module")
def bomb_results(tmp_path_factory) -> dict[str, dict[str, object]]:
    """What became of each bomb, in one process that may use 3 GiB beyond what torch maps when it is imported."""
    folder = tmp_path_factory.mktemp("bombs")
    for name, bomb in BOMBS.items():
        (folder / name).write_bytes(bomb())
    script = """
        import json, resource, sys, time
        from pathlib import Path
        from te_export.checkpoint import read_checkpoint
        from te_export.errors import CheckpointError
        if sys.platform == "linux":  # elsewhere the limit is not enforced, or not known
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + (3 << 30),) * 2)
        results = {}
        for path in sorted(Path(sys.argv[1]).iterdir()):
            started = time.process_time()
            try:
                read_checkpoint(path)
                message = None
            except CheckpointError as error:
                message = str(error)
            results[path.name] = {"message": message, "seconds": time.process_time() - started}
        print(json.dumps(results))
    """
    results: dict[str, dict[str, object]] = json.loads(run_python(script, folder))
    return results


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_are_refused_soon_and_in_little_memory(bomb_results, bomb):
    result = bomb_results[bomb]
    assert result["message"] is not None
    assert str(result["message"]).isprintable()
    assert (
        float(str(result["seconds"])) < 10.0
    )  # of processor time; each takes well under two on an idle core


def run_python(script: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_nothing_runs_under_an_audit_hook(tmp_path):
    for index, attack in enumerate(CALLS):
        data, _ = names_of_calls(tmp_path / "canary")[attack]
        (tmp_path / f"zip{index}.pt").write_bytes(in_zip(data))
        (tmp_path / f"old{index}.pt").write_bytes(in_legacy(data))
    script = """
        import encodings.cp437, os, sys  # zipfile decodes names by it
        from pathlib import Path
        from te_export.checkpoint import read_checkpoint
        from te_export.errors import CheckpointError

        forbidden = ("os.system", "os.exec", "os.spawn", "os.posix_spawn", "os.fork", "subprocess.", "socket.",
                     "exec", "compile", "shutil.", "os.remove", "os.rename", "os.mkdir", "ctypes.", "pickle.find_class")

        def watch(event, arguments):
            if event.startswith(forbidden) or (event == "import" and arguments[0] not in sys.modules):
                seen = True
            elif event == "open":
                mode, flags = arguments[1], arguments[2]
                seen = (mode and set(mode) & set("wax+")) or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            else:
                seen = False
            if seen and watching:
                os.write(2, f"{event} {arguments}".encode())
                os._exit(66)

        paths = sorted(Path(sys.argv[1]).glob("*.pt"))
        watching = False
        sys.addaudithook(watch)
        refused = 0
        for path in (paths[0], *paths):  # the first once without watching, for what is imported late
            try:
                read_checkpoint(path)
            except CheckpointError:
                refused += 1
            watching = True
        print("refused", refused - 1)
    """
    assert run_python(script, tmp_path).split() == ["refused", str(2 * len(CALLS))]
    assert not (tmp_path / "canary").exists()


def good_files(folder: Path) -> list[Path]:
    """One small checkpoint of each container, with a module, a config and an optimizer."""
    torch.manual_seed(3)
    layers = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    value = {
        "model": layers,
        "config": {"expert_dim": 4, "dims": [1, 2]},
        "optimizer": torch.optim.SGD(layers.parameters()).state_dict(),
    }
    torch.save(value, folder / "zip.pt")
    torch.save(value, folder / "old.pt", _use_new_zipfile_serialization=False)
    torch.save(value, folder / "four.pt", _use_new_zipfile_serialization=False, pickle_protocol=4)
    save_file(layers.state_dict(), folder / "s.safetensors", metadata={"config": '{"expert_dim": 4}'})
    return sorted(folder.iterdir())


def refusal(path: Path) -> str | None:
    """Why the file was refused, or None where it was read; any other exception is the test's failure."""
    try:
        read_checkpoint(path)
    except CheckpointError as error:
        message = str(error)
    else:
        return None
    assert message.isprintable()
    return message


def test_files_cut_short_anywhere(tmp_path):
    for source in good_files(tmp_path):
        data = source.read_bytes()
        read_checkpoint(source)
        for part in range(50):
            source.write_bytes(data[: len(data) * part // 50])
            with pytest.raises(CheckpointError):
                read_checkpoint(source)


def mutated(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice([1, 1, 2, 8])):
        at = chance.randrange(len(changed))
        kind = chance.randrange(5)
        if kind == 0:
            changed[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            changed[at] = chance.randrange(256)
        elif kind == 2:
            del changed[at : at + chance.choice([1, 4, 16])]
        elif kind == 3:
            changed[at:at] = chance.randbytes(chance.choice([1, 4, 16]))
        else:
            source = chance.randrange(len(changed))
            changed[at : at + 16] = changed[source : source + 16]
    return bytes(changed)


@pytest.mark.parametrize("seed", range(4))
def test_damage_at_random(tmp_path, seed):
    """Every result is a Checkpoint or a CheckpointError; the zip format's checksums find all damage to weights."""
    chance = random.Random(seed)
    source = good_files(tmp_path)[seed]
    data = source.read_bytes()
    expected = read_checkpoint(source).state
    for _ in range(250):
        source.write_bytes(mutated(data, chance))
        try:
            found = read_checkpoint(source)
        except CheckpointError:
            continue
        if found.container == "torch-zip":
            assert all(torch.equal(found.state[name], tensor) for name, tensor in expected.items())


def test_damage_inside_the_pickle(tmp_path):
    """The same, past the checksum: the archive is written anew around a damaged pickle."""
    chance = random.Random(11)
    torch.save(torch.nn.Linear(3, 2), tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as archive:
        data = archive.read("good/data.pkl")
        records = {f"_{key}": archive.read(f"good/data/{key}") for key in (0, 1)}
    path = tmp_path / "bad.pt"
    read = refused = 0
    for _ in range(600):
        path.write_bytes(in_zip(mutated(data, chance), **records))
        if refusal(path) is None:
            read += 1
        else:
            refused += 1
    assert read > 10
    assert refused > 100


def test_random_instructions(tmp_path):
    """Pickles of random but valid opcodes reach further than random bytes."""
    chance = random.Random(5)
    parts = [
        *(
            b"(",
            b"N",
            b"K\x01",
            b"]",
            b"}",
            b")",
            b"\x8f",
            b"0",
            b"2",
            b"1",
            b"t",
            b"l",
            b"d",
            b"e",
            b"a",
            b"s",
            b"u",
        ),
        *(
            b"R",
            b"b",
            b"\x81",
            b"\x92",
            b"o",
            b"\x93",
            b"Q",
            b"\x85",
            b"\x86",
            b"\x87",
            b"\x90",
            b"\x91",
            b"\x94",
        ),
        *(
            b"h\x00",
            b"h\x01",
            b"q\x00",
            b"X\x01\x00\x00\x00a",
            b"X\x05\x00\x00\x00model",
            b"X\x06\x00\x00\x00config",
        ),
        *(b"ccollections\nOrderedDict\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch.nn\nLinear\n"),
        *(b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x06tQ",),
    ]
    path = tmp_path / "model.pt"
    for _ in range(800):
        data = b"".join(chance.choice(parts) for _ in range(chance.randrange(1, 40)))
        path.write_bytes(in_zip(b"\x80\x02" + data + b".", _0=bytes(24)))
        refusal(path)

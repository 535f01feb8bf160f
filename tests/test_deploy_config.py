"""What a cluster is to be and where its parts go: options and their limits, placement, state, clean-up by name."""

from __future__ import annotations

import dataclasses
import errno
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import POCKET
from hypothesis import given
from hypothesis import strategies as st

from deploy.actors import FREE_RESTARTS, MAX_BACKOFF_S, ServerActor, ServerSpec, StartLog, backoff_s, port_file
from deploy.config import ClusterConfig, ConfigError, DeployError, machine_dir, parse_bytes, temp_base
from deploy.placement import Machine, gpu_share, place, router_machines, surplus, usable
from deploy.processes import command, end_all, is_running, processes_of
from deploy.specs import PlacedSpec, Specs
from deploy.state import AlreadyServing, ServeState, StateDir, folders_of, start_ticks
from deploy.widths import kv_pieces
from engine.config import ModelConfig
from engine.errors import UnsupportedModel
from kvstore.blocks import KVLayout
from kvstore.server import StoreConfig
from router.config import RouterConfig

ID = "0123abcd"


def cluster_config(**options: Any) -> ClusterConfig:
    return ClusterConfig(**({"model_dir": POCKET} | options))


def machines(count: int, cores: int = 8, gpus: int = 0) -> list[Machine]:
    return [Machine(f"{n:056x}", f"10.0.0.{n + 1}", f"host-{n}", cores, gpus) for n in range(count)]


# --- options ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1048576", 2**20),
        ("512M", 512 * 2**20),
        ("2GiB", 2 * 2**30),
        ("1.5g", 3 * 2**29),
        ("64 kb", 65536),
        ("1t", 2**40),
    ],
)
def test_parse_bytes(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "M", "-1M", "1X", "1 2", "1e9", "nan"])
def test_parse_bytes_refuses(text: str) -> None:
    with pytest.raises(ConfigError, match="write it like 512M"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefill": -1}, "--prefill"),
        ({"prefill": 0, "decode": 0}, "between 1 and 256"),
        ({"prefill": 2, "decode": 0}, "--decode must be 1 or more"),
        ({"routers": 0}, "--routers"),
        ({"port": 70000}, "between 0 and 65535, got 70000"),
        ({"http_port": -1}, "between 0 and 65535, got -1"),
        ({"metrics_port": 70000}, "--metrics-port"),
        ({"min_machines": -1}, "--min-machines"),
        ({"min_machines": 2}, "--min-machines must be 1 at most without --ray-address"),
        ({"block_size": 0}, "--block-size"),
        ({"kv_bytes": 5}, "--kv-memory"),
        ({"store_bytes": 5}, "--store-memory"),
        ({"store_disk_bytes": 1 << 30}, "--store-disk-dir"),
        ({"store_disk_bytes": -1}, "--store-disk-bytes"),
        ({"num_threads": -1}, "--num-threads"),
        ({"cluster": "a b"}, "--cluster"),
        ({"ray_address": "ray://a:10001"}, "--ray-address"),
        ({"store_base": Path("/" + "x" * 60)}, "--store-dir"),
        ({"model_dir": Path("/nowhere")}, "no folder /nowhere"),
    ],
)
def test_option_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cluster_config(**options)


def test_a_tenants_file_is_checked_before_anything_starts(tmp_path: Path) -> None:
    file = tmp_path / "tenants.toml"
    with pytest.raises(ConfigError, match=r"--tenants: .*tenants\.toml: .*No such file"):
        cluster_config(tenants_file=file)
    file.write_text('[[tenant]]\nname = "a"\nkey_sha256 = "no"\n')
    with pytest.raises(ConfigError, match=r"--tenants: .*tenants\.toml: line 3: tenant\.key_sha256: must be 64 hex"):
        cluster_config(tenants_file=file)
    file.write_text(f'[[tenant]]\nname = "a"\nkey_sha256 = "{"0" * 64}"\n')
    specs = specs_of(cluster_config(tenants_file=file, routers=2))
    told = [(one.spec.kind, getattr(one.spec.config, "tenants_file", "")) for one in specs]
    assert [path for kind, path in told if kind == "router"] == [str(file)] * 2
    assert not any(path for kind, path in told if kind != "router")


def specs_of(config: ClusterConfig) -> Iterator[PlacedSpec]:
    """All servers on one machine."""
    (machine,) = machines(1)
    layout = KVLayout("m", "float32", block_size=16, num_layers=1, num_kv_heads=1, head_dim=8)
    return Specs(config, ID, "redis://r", layout).all([machine], place(config, [machine]), machine)


def test_each_router_has_ports_of_its_own() -> None:
    given = [one.spec.config for one in specs_of(cluster_config(routers=2, port=8200, http_port=8000))]
    assert [(c.port, c.http_port) for c in given if isinstance(c, RouterConfig)] == [(8200, 8000), (8201, 8001)]
    chosen = [one.spec.config for one in specs_of(cluster_config(routers=2, http=False))]
    assert [(c.port, c.http_port, c.http) for c in chosen if isinstance(c, RouterConfig)] == [(0, 0, False)] * 2


def test_what_is_asked_of_the_disk_reaches_the_store(tmp_path: Path) -> None:
    disk = {"store_disk_bytes": 5, "store_disk_dir": tmp_path, "store_disk_admission": "second-touch"}
    (store,) = (one.spec.config for one in specs_of(cluster_config(**disk)) if one.spec.kind == "store")
    assert isinstance(store, StoreConfig)
    assert (store.disk_bytes, store.disk_admission) == (5, "second-touch")
    assert Path(store.disk_dir).parent == tmp_path.resolve()


def test_names_and_roles() -> None:
    config = cluster_config(prefill=1, decode=2, both=1)
    assert config.roles == ("prefill", "decode", "decode", "both")
    assert config.model_name == "pocket"
    assert cluster_config(served_model_name="mine").model_name == "mine"


def test_machines_that_share_a_file_system_have_folders_of_their_own() -> None:
    first, second = (machine_dir(Path("/dev/shm"), ID, node_id) for node_id in ("a" * 56, "b" * 56))
    assert first != second
    assert len(str(first / "control")) < 107


# --- placement ---


def test_each_role_is_spread_over_machines() -> None:
    placements = place(cluster_config(prefill=2, decode=2), machines(2))
    on = {(p.role, p.machine.address) for p in placements}
    assert on == {(role, address) for role in ("prefill", "decode") for address in ("10.0.0.1", "10.0.0.2")}
    assert [p.node_id for p in placements] == ["prefill-0", "prefill-1", "decode-0", "decode-1"]


def test_one_of_each_goes_to_two_machines() -> None:
    prefill, decode = place(cluster_config(), machines(2))
    assert prefill.machine != decode.machine
    assert (prefill.num_threads, decode.num_threads) == (8, 8)


def test_cores_are_shared_out() -> None:
    assert {p.num_threads for p in place(cluster_config(prefill=2, decode=2), machines(1, cores=2))} == {1}
    assert [p.num_threads for p in place(cluster_config(prefill=1, decode=1), machines(1, cores=9))] == [5, 4]
    assert {p.num_threads for p in place(cluster_config(num_threads=3), machines(1))} == {3}


@pytest.mark.parametrize(
    ("options", "cores", "shares", "is_crowded"),
    [
        ({}, 2, [(0, 2), (1, 2)], False),
        ({"num_threads": 1}, 2, [(0, 2), (1, 2)], False),
        ({"prefill": 2}, 8, [(0, 3), (1, 3), (2, 3)], False),
        ({"prefill": 0, "decode": 0, "both": 1}, 4, [(0, 1)], False),
        ({"num_threads": 2}, 2, [(0, 0), (0, 0)], True),
        ({}, 1, [(0, 0), (0, 0)], True),
        ({"pin_cores": False}, 8, [(0, 0), (0, 0)], False),
    ],
)
def test_nodes_get_cores_of_their_own_where_these_suffice(
    options: dict[str, Any], cores: int, shares: list[tuple[int, int]], is_crowded: bool
) -> None:
    placements = place(cluster_config(**options), machines(1, cores))
    assert [(p.core_share, p.num_core_shares) for p in placements] == shares
    assert {p.is_crowded for p in placements} == {is_crowded}


def test_shares_of_cores_are_a_machine_s_own() -> None:
    placements = place(cluster_config(prefill=2, decode=2), machines(2))
    assert sorted((p.machine.name, p.core_share, p.num_core_shares) for p in placements) == [
        ("host-0", 0, 2),
        ("host-0", 1, 2),
        ("host-1", 0, 2),
        ("host-1", 1, 2),
    ]
    assert {p.num_core_shares for p in place(cluster_config(), machines(1, gpus=2))} == {0}, "a GPU does the work"


@pytest.mark.parametrize("pin", ["10.0.0.2", "host-1"])
def test_roles_can_be_pinned(pin: str) -> None:
    config = cluster_config(prefill=2, decode=1, prefill_hosts=(pin,), decode_hosts=("10.0.0.1",))
    assert [p.machine.name for p in place(config, machines(2))] == ["host-1", "host-1", "host-0"]


def test_pin_to_an_unknown_machine() -> None:
    with pytest.raises(ConfigError, match=r"--decode-hosts: no Ray machine elsewhere; there are: 10.0.0.1, 10.0.0.2"):
        place(cluster_config(decode_hosts=("elsewhere",)), machines(2))


def test_machines_are_named_by_custom_resource_and_others_are_left_alone() -> None:
    """As on Kubernetes: a head and a launcher without work, a group of machines for each role, one for routers."""
    tags = ["head", "prefill-pool", "decode-pool", "decode-pool", "router-pool", "router-pool"]
    there = [dataclasses.replace(one, tags=frozenset({tag})) for one, tag in zip(machines(6), tags, strict=True)]
    hosts = {"prefill_hosts": ("prefill-pool",), "decode_hosts": ("decode-pool",), "router_hosts": ("router-pool",)}
    config = cluster_config(decode=3, routers=3, port=8200, metrics_port=9400, **hosts)
    placements = place(config, there)
    assert [p.machine.name for p in placements] == ["host-1", "host-2", "host-3", "host-2"]
    layout = KVLayout("m", "float32", block_size=16, num_layers=1, num_kv_heads=1, head_dim=8)
    specs = [*Specs(config, ID, "redis://r", layout).all(there, placements, there[0])]
    on = {kind: [one.machine.name for one in specs if one.spec.kind == kind] for kind in ("store", "router")}
    assert on == {"store": ["host-1", "host-2", "host-3"], "router": ["host-4", "host-5", "host-4"]}
    given = [one.spec.config for one in specs if isinstance(one.spec.config, RouterConfig)]
    assert [config.port for config in given] == [8200, 8200, 8201], "one port for all pods behind a Service"
    ports = {(one.machine.name, one.spec.name): one.spec.config.metrics_port for one in specs}
    assert {ports["host-2", name] for name in ("store-10.0.0.3", "decode-0", "decode-2")} == {9400, 9401, 9402}
    assert ports["host-4", "router-0"] == 9400 and ports["host-4", "router-2"] == 9401
    assert len({(one.machine.name, one.spec.config.metrics_port) for one in specs}) == len(specs)


def test_without_names_every_machine_has_a_store_and_the_launcher_s_the_routers() -> None:
    there = machines(3)
    assert usable(cluster_config(), there) == there
    assert usable(cluster_config(prefill_hosts=("host-1",)), there) == there, "decode nodes may be on any"
    assert router_machines(cluster_config(routers=2), there, there[1]) == [there[1]] * 2
    with pytest.raises(ConfigError, match=r"--router-hosts: no Ray machine elsewhere"):
        router_machines(cluster_config(router_hosts=("elsewhere",)), there, there[0])


def test_nodes_go_where_gpus_are() -> None:
    mixed = [*machines(1), dataclasses.replace(machines(2, gpus=4)[1])]
    placements = place(cluster_config(prefill=2, decode=2), mixed)
    assert {p.machine.name for p in placements} == {"host-1"}
    assert {p.num_gpus for p in placements} == {1.0}


@given(st.integers(1, 40), st.integers(1, 9))
def test_shares_of_gpus_fit(nodes: int, gpus: int) -> None:
    share = gpu_share(nodes, gpus)
    assert 0 < share <= 1
    assert int(1 / share + 1e-9) * gpus >= nodes
    assert gpu_share(nodes, 0) == 0


@given(st.integers(0, 5), st.integers(1, 5), st.integers(1, 7))
def test_placement_is_whole_and_even(prefill: int, decode: int, count: int) -> None:
    placements = place(cluster_config(prefill=prefill, decode=decode), machines(count))
    assert len({p.node_id for p in placements}) == prefill + decode
    for role in ("prefill", "decode"):
        on = [sum(p.role == role and p.machine == m for p in placements) for m in machines(count)]
        assert max(on) - min(on) <= 1


def test_those_with_the_highest_numbers_are_too_many() -> None:
    existing = place(cluster_config(prefill=2, decode=12, decode_tensor_parallel_size=2), machines(2))
    assert surplus(cluster_config(prefill=2, decode=12), existing) == set()
    assert surplus(cluster_config(prefill=1, decode=10), existing) == {"prefill-1", "decode-10", "decode-11"}
    assert surplus(cluster_config(prefill=0, decode=0, both=1), existing) == {p.node_id for p in existing}


# --- crash loops ---


def test_backoff_grows_and_is_forgotten() -> None:
    waits = [backoff_s([100.0] * crashes, 101.0) for crashes in range(12)]
    assert waits[: FREE_RESTARTS + 1] == [0.0] * (FREE_RESTARTS + 1)
    assert waits[FREE_RESTARTS + 1 : FREE_RESTARTS + 4] == [0.5, 1.0, 2.0]
    assert waits[-1] == MAX_BACKOFF_S
    assert backoff_s([100.0] * 12, 1000.0) == 0.0
    assert backoff_s([100.0] * 12 + [990.0], 1000.0) == 0.0


def test_endless_crash_loop_settles_at_the_longest_wait() -> None:
    starts, now = [0.0], 1.0
    for _ in range(40):
        now += backoff_s(starts, now) + 1.0
        starts.append(now)
    assert backoff_s(starts, now + 1.0) == MAX_BACKOFF_S


def test_start_log(tmp_path: Path) -> None:
    log = StartLog(tmp_path / "machine" / "prefill-0.starts")
    assert log.read() == []
    log.add(1.5)
    log.add(2.25)
    assert log.read() == [1.5, 2.25]


async def test_one_of_a_name_that_was_there_before_says_what_is_wrong(tmp_path: Path) -> None:
    """As after a `baton scale` that failed: it is no restart, which would end its process and be tried for ever."""
    config = RouterConfig(model_dir=str(tmp_path / "nothing"), redis_url="redis://127.0.0.1:1/0")
    for life in ("a", "b", "c", "d"):
        spec = ServerSpec("router", "router-0", config, tmp_path / "machine", life=life)
        assert "nothing" in (await ServerActor(spec).ready()).error


# --- state ---


def state_of(pid: int, **fields: Any) -> ServeState:
    return ServeState(pid, start_ticks(pid), "default", ID, "pocket", "unix:///x", **fields)


def test_state_is_found_while_it_is_claimed(tmp_path: Path) -> None:
    mine, other = StateDir(tmp_path / "state"), StateDir(tmp_path / "state")
    assert not other.alive()
    mine.claim()
    assert other.alive()
    with pytest.raises(DeployError, match="no cluster is up"):
        other.running()
    state = state_of(os.getpid(), routers=("127.0.0.1:1",))
    mine.write(state)
    assert other.running() == state
    assert stat.S_IMODE((tmp_path / "state" / "serve.json").stat().st_mode) == 0o600
    with pytest.raises(AlreadyServing, match="baton down"):
        other.claim()
    mine.release()
    mine.release()
    assert not other.alive()
    assert other.read() is None


def test_a_state_that_cannot_be_written_names_its_option(tmp_path: Path) -> None:
    mine = StateDir(tmp_path / "state")
    mine.claim()
    (tmp_path / "state" / "lock").unlink()
    (tmp_path / "state").rmdir()
    with pytest.raises(DeployError, match=r"--state-dir .*/state: cannot be written to: No such file"):
        mine.write(state_of(os.getpid()))
    mine.release()


def test_without_a_place_for_temporary_files_it_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where all disks are full."""

    def fail() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", fail)
    with pytest.raises(DeployError, match="TMPDIR: No usable temporary directory found"):
        temp_base()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"pid": 1}', '{"routers": 5, "bases": []}'])
def test_damaged_state_is_no_state(tmp_path: Path, text: str) -> None:
    (tmp_path / "serve.json").write_text(text)
    assert StateDir(tmp_path).read() is None


def test_only_the_process_that_wrote_the_state_is_signalled(tmp_path: Path) -> None:
    mine = StateDir(tmp_path)
    mine.claim()
    mine.write(dataclasses.replace(state_of(os.getpid()), start_ticks=1))
    with pytest.raises(DeployError, match="nothing was signalled"):
        StateDir(tmp_path).ask_to_stop(1.0)
    mine.release()


def test_sweep_takes_what_a_killed_cluster_left_and_nothing_else(tmp_path: Path) -> None:
    for name in (f"baton-{ID}", f"baton-{ID}-aaaabbbb", "baton-ffffffff", f"other-{ID}"):
        (tmp_path / name).mkdir()
    state_dir = StateDir(tmp_path / "state")
    state_dir.claim()
    state_dir.write(state_of(os.getpid(), bases=(str(tmp_path),)))
    assert state_dir._lock is not None
    state_dir._lock.close()  # as the kernel does when a process is killed
    assert {path.name for path in StateDir(tmp_path / "state").sweep()} == {f"baton-{ID}", f"baton-{ID}-aaaabbbb"}
    assert {path.name for path in tmp_path.iterdir()} == {"state", "baton-ffffffff", f"other-{ID}"}


@pytest.mark.parametrize("cluster_id", ["", "*", "../..", "0123ABCD", "0123abcd*"])
def test_sweep_believes_no_strange_id(tmp_path: Path, cluster_id: str) -> None:
    (tmp_path / "baton-ffffffff").mkdir()
    assert folders_of(cluster_id, tmp_path) == []


# --- processes ---


def test_processes_are_found_by_what_they_inherited() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], env={"BATON_TEST": ID})
    try:
        assert processes_of("BATON_TEST", ID) == [child.pid]
        assert is_running(child.pid)
        assert command(child.pid).startswith("python")
        assert end_all([child.pid], wait_s=0.1) == []
        assert child.wait() != 0
    finally:
        child.kill()
        child.wait()
    assert not is_running(child.pid)


class Router:
    """Starts, whatever it is given."""

    async def start(self) -> dict[str, str]:
        return {"address": "127.0.0.1:7", "http_address": "127.0.0.1:8"}

    async def stop(self) -> None: ...


async def test_a_full_disk_keeps_no_server_from_coming_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody asks a restarted actor whether it is ready: one that failed here would stay there, without a server."""
    config: Any = None
    spec = ServerSpec("router", "router-0", config, tmp_path / "machine")
    monkeypatch.setattr("deploy.actors.build", lambda spec, report: Router())
    assert not (await ServerActor(spec).ready()).error
    assert [(port_file(spec, name)).read_text() for name in ("port", "http-port")] == ["7", "8"]

    original = Path.open

    def open_full(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        if mode[0] in "aw":
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(path, mode, *args, **options)

    monkeypatch.setattr(Path, "open", open_full)
    assert (await ServerActor(spec).ready()).record["address"] == "127.0.0.1:7"


# --- wide nodes ---


def test_a_wide_node_is_a_placement_for_each_rank() -> None:
    config = cluster_config(prefill=1, decode=2, decode_tensor_parallel_size=2, decode_pipeline_parallel_size=2)
    placements = place(config, machines(2, cores=8))
    ranks = {p.node_id: [q for q in placements if q.node_id == p.node_id] for p in placements}
    assert {name: [p.rank for p in own] for name, own in ranks.items()} == {
        "prefill-0": [0],
        "decode-0": [0, 1, 2, 3],
        "decode-1": [0, 1, 2, 3],
    }
    for name in ("decode-0", "decode-1"):
        on = [p.machine.name for p in ranks[name]]
        assert on[0] == on[1] != on[2] == on[3], "a stage's ranks share a machine, and stages spread"
    for machine in machines(2, cores=8):
        shares = [(p.core_share, p.num_core_shares) for p in placements if p.machine == machine]
        assert sorted(shares) == [(n, len(shares)) for n in range(len(shares))]


def test_a_rank_has_a_gpu_of_its_own() -> None:
    config = cluster_config(prefill=1, decode=1, tensor_parallel_size=4)
    assert {p.num_gpus for p in place(config, machines(1, gpus=8))} == {1.0}
    with pytest.raises(ConfigError, match="each needs one of its own"):
        place(config, machines(1, gpus=4))
    one = place(cluster_config(prefill=1, decode=1), machines(1, gpus=2))
    with pytest.raises(ConfigError, match=r"all 2 GPUs of 10\.0\.0\.1 are taken"):
        place(cluster_config(prefill=1, decode=2), machines(1, gpus=2), one)
    assert place(cluster_config(prefill=1, decode=2), machines(1, gpus=3), one)[0].num_gpus == 1.0


def test_new_nodes_join_those_that_are_there() -> None:
    before = place(cluster_config(prefill=1, decode=2), machines(2))
    left = [p for p in before if p.node_id != "decode-0"]
    new = place(cluster_config(prefill=2, decode=2), machines(2), left)
    assert [p.node_id for p in new] == ["prefill-1", "decode-0"]
    assert new[0].machine != before[0].machine
    assert place(cluster_config(prefill=1, decode=1), machines(2), before) == []


@pytest.mark.parametrize(
    ("sizes", "pieces"),
    [({}, (1, 1)), ({"decode": 4}, (1, 2)), ({"prefill": 2}, (1, 2)), ({"prefill_pp": 2, "decode": 2}, (2, 2))],
)
def test_blocks_are_cut_for_the_widest(tiny_model_dir: Path, sizes: dict[str, int], pieces: tuple[int, int]) -> None:
    """Of a model of 2 layers and 2 key heads."""
    names = {"prefill": "prefill_tensor", "decode": "decode_tensor", "prefill_pp": "prefill_pipeline"}
    config = cluster_config(**{f"{names[name]}_parallel_size": size for name, size in sizes.items()})
    assert kv_pieces(config.widths, ModelConfig.from_pretrained(tiny_model_dir)) == pieces


def test_a_width_that_does_not_fit_is_refused(tiny_model_dir: Path) -> None:
    with pytest.raises(ConfigError, match="--tensor-parallel-size must be 1 or more, got -1"):
        cluster_config(tensor_parallel_size=-1)
    widths = cluster_config(decode_tensor_parallel_size=3).widths
    with pytest.raises(UnsupportedModel, match="num_attention_heads"):
        kv_pieces(widths, ModelConfig.from_pretrained(tiny_model_dir))

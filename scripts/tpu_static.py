"""Static cost of JAX programs on TPU generations, measured without a TPU.

libtpu from PyPI compiles ahead of time for real TPU targets on a CPU-only
machine, and its debug flags dump the scheduled VLIW bundles of every HLO op,
Pallas (Mosaic) kernels included.  This tool compiles a program, reads those
dumps and *walks their scalar control flow* (loop counters, predicates, branches,
DMA issue and wait; no tensor data), and so knows how often each bundle runs.
One bundle is one issue cycle:

    issue  bundles x executions: compute time if no DMA were ever waited for
    est    the same walk with DMA waits modelled: a FIFO HBM channel per core at
           the achievable bandwidth, plus a fixed latency per DMA

The numbers are deterministic: the same source, jax and libtpu give the same
ones, so they can gate regressions.

Usage
    python tpu_static.py SPEC [SPEC ...] [--target v5p,v6e] [options]

SPEC is `path/to/file.py:name` or `package.module:name`, where `name` is a
function that returns one case or a list of cases; it is called with no
arguments, or with literals given after a second colon: `file.py:name:64,"bf16"`.
A case is a tuple `(fn, args[, name])` or a dict with the keys

    fn        the function to jit and compile
    args      a tuple of pytrees of jax.ShapeDtypeStruct
    name      label in the report                            (default: fn's name)
    flops     algorithmic flops for the roofline   (default: XLA's cost_analysis)
    bytes     algorithmic HBM bytes               (default: arguments + outputs)
    scalars   {operand index: int array}: values of a Pallas kernel's integer
              operands (scalar prefetch, dynamic grid bounds), so that control
              flow that depends on them can be walked; or
              {kernel name: {operand index: int array}}, of which an op takes
              the longest name that is in its own; or a function that returns
              either, called where the TPU is known
    options   XLA compiler options for `.compile(compiler_options=...)`

Options
    --target T,..       v4 v5e v5p v6e tpu7x (default v5p,v6e)
    --top N             rows per program in the table (default 12)
    --loops             print the loops and conditional regions of the costliest ops
    --trip NAME=N       trip count of an HLO while NAME, or of the loop OP@0xADDR
                        of an op, where the bound is not known at compile time
    --dma-latency NS    fixed latency of one HBM DMA in the model (default 450:
                        what published v5e timings of a 128-blocked Pallas matmul
                        imply; XLA's own cost model implies 600)
    --hbm-efficiency X  achievable share of the published HBM bandwidth (default:
                        per generation, what XLA's `estimated_cycles` imply for
                        element-wise ops)
    --xla-flag F        extra libtpu flag, repeatable
    --json FILE         all numbers, machine-readable
    --keep DIR          keep the dumps under DIR (default: a temporary folder)
    --reuse             with --keep: use dumps already there, do not compile

Columns
    n        how often the op runs (product of the enclosing HLO trip counts)
    bundles  static size of the schedule, stall bundles included
    trips    iterations of the op's busiest loop, on one core
    cyc/it   issue cycles per iteration of that loop
    issue    issue cycles of all n runs            est   the same with the DMA model
    xla      XLA's own `estimated_cycles` x n, where it states one
    MXU      share of MXU time spent streaming rows, in that loop
    push     the same for loading weights (it overlaps with streaming)
    XLU..    share of the slots of that class that are issued, in that loop
    spill    vector-register spills + fills per iteration
    HBM      bytes moved by the op's own DMAs, all cores
    VMEM     scoped VMEM of the op
A star marks an op whose walk met something unresolved, which is then listed.

What it cannot see: HBM page misses and contention beyond the FIFO model, the
inefficiency of DMAs of small strides, VMEM bank conflicts, ICI, throttling,
instruction overlay loads, the launch of the program (about 0.1 ms when timed
from Python), and control flow that depends on tensor data (reported as
unresolved: such a forward branch is taken to fall through, so the region counts
as run, and such a loop is left).  Ratios between variants are more trustworthy
than absolute times.

Depends on jax, libtpu and numpy only.
"""

from __future__ import annotations

import argparse
import ast
import bisect
import collections
from collections.abc import Callable
import dataclasses
import glob
import importlib
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from typing import Any

TOPOLOGY = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}
DUMP_FLAGS = (
    "--xla_jf_dump_to={dir} --xla_jf_dump_hlo_text=true"
    " --xla_jf_dump_llo_text=true --xla_jf_emit_annotations=true"
)
SCHEDULE = "packed-bundles-post-ra"  # the last one with stalls spelled out
USAGE = "pre-delay_hlo-static-per-bundle-utilization"
PROFILE = "hlo-static-bundle-profile"
SHARED = "deduplication-map"
KEPT_DUMPS = tuple(
    f"-{name}.txt" for name in (SCHEDULE, USAGE, PROFILE, SHARED, "TLP-hlo"))


# --------------------------------------------------------------------------
# Chips
# --------------------------------------------------------------------------

# name -> bf16 flops/s and HBM bytes/s of a chip as published on
# cloud.google.com/tpu/docs (jax's table is rounded), the achievable share of that
# bandwidth (fitted to XLA's cost model) and the DMA unit in bytes (from dumps).
PUBLISHED = {
    "v4": (275e12, 1228e9, 0.70, 512),
    "v5e": (197e12, 819e9, 0.86, 32),
    "v5p": (459e12, 2765e9, 0.80, 32),
    "v6e": (918e12, 1640e9, 0.92, 32),
    "tpu7x": (2307e12, 7380e9, 0.98, 32),
}


@dataclasses.dataclass
class Chip:
  """Peak rates and sizes of one jax device of a generation, per TensorCore."""

  name: str
  cores: int  # TensorCores behind one jax device (2: megacore)
  mxus: int
  mxu_dim: int
  bf16_flops: float  # per second
  hbm_bytes: float  # per second
  hbm_efficiency: float
  granule: int
  vmem_bytes: int

  @property
  def flops_per_cycle(self) -> float:
    rows = 1 if self.mxu_dim == 128 else 2  # rows an MXU takes per cycle
    return self.mxus * rows * 2 * self.mxu_dim**2

  @property
  def hz(self) -> float:
    return self.bf16_flops / self.flops_per_cycle

  @property
  def bytes_per_cycle(self) -> float:
    return self.hbm_bytes / self.hz


def chip_info(target: str, info) -> Chip:
  """`info` is jax's TpuInfo of the mesh being compiled for."""
  key = target.split(":")[0]
  per_chip = info.chip_version.num_physical_tensor_cores_per_chip
  flops, bandwidth, efficiency, granule = PUBLISHED[key]
  return Chip(
      name=key, cores=info.num_cores, mxus=info.num_mxus,
      mxu_dim=info.mxu_column_size, bf16_flops=flops / per_chip,
      hbm_bytes=bandwidth / per_chip, hbm_efficiency=efficiency,
      granule=granule, vmem_bytes=info.vmem_capacity_bytes)


# --------------------------------------------------------------------------
# Cases: what the user wants measured
# --------------------------------------------------------------------------


def load_cases(spec: str) -> list[dict[str, Any]]:
  """Imports the spec's function, calls it and normalises what it returns."""
  path, is_file, rest = spec.partition(".py:")
  if is_file:
    path = os.path.abspath(path + ".py")
    name, _, literals = rest.partition(":")
    stem = os.path.splitext(os.path.basename(path))[0]
    sys.path.insert(0, os.path.dirname(path))
    module_spec = importlib.util.spec_from_file_location(stem, path)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[stem] = module
    module_spec.loader.exec_module(module)
  else:
    sys.path.insert(0, os.getcwd())
    module_name, name, literals = (spec.split(":", 2) + [""])[:3]
    module = importlib.import_module(module_name)
  cases = getattr(module, name)(*(ast.literal_eval(f"({literals},)") if literals else ()))
  out = []
  for case in cases if isinstance(cases, list) else [cases]:
    if not isinstance(case, dict):
      case = dict(zip(("fn", "args", "name"), case))
    out.append({"name": getattr(case["fn"], "__name__", name), **case})
  return out


def compile_case(spec: str, index: int, target: str, directory: str) -> None:
  """Compiles one case; runs in a child whose environment holds the dump flags."""
  import jax
  from jax.experimental import topologies
  from jax.experimental.pallas import tpu as pltpu
  from jax.sharding import Mesh, NamedSharding, PartitionSpec
  import numpy as np

  case = load_cases(spec)[index]
  topology = topologies.get_topology_desc(
      platform="tpu", topology_name=TOPOLOGY[target])
  mesh = Mesh(np.array(topology.devices[:1]), ("x",))
  sharding = NamedSharding(mesh, PartitionSpec())
  args = jax.tree.map(
      lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
      tuple(case["args"]))
  fn = case["fn"] if hasattr(case["fn"], "lower") else jax.jit(case["fn"])
  # The abstract mesh tells Pallas lowering rules which TPU they target; without
  # it they ask the default device, which here is a CPU.
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    chip = chip_info(target, pltpu.get_tpu_info())
    scalars = case.get("scalars") or {}
    scalars = scalars() if callable(scalars) else scalars
    compiled = fn.lower(*args).compile(compiler_options=case.get("options"))
  memory = compiled.memory_analysis()
  cost = compiled.cost_analysis() or {}
  if not any(isinstance(k, str) for k in scalars):
    scalars = {"": scalars}
  record = {
      "name": case["name"],
      "target": target,
      "device_kind": topology.devices[0].device_kind,
      "chip": dataclasses.asdict(chip),
      "jax": jax.__version__,
      "args_bytes": memory.argument_size_in_bytes,
      "out_bytes": memory.output_size_in_bytes,
      "temp_bytes": memory.temp_size_in_bytes,
      "code_bytes": memory.generated_code_size_in_bytes,
      "xla_flops": cost.get("flops"),
      "xla_bytes": cost.get("bytes accessed"),
      "optimal_seconds": cost.get("optimal_seconds"),
      "flops": case.get("flops"),
      "bytes": case.get("bytes"),
      "scalars": {
          kernel: {str(i): np.asarray(v).reshape(-1).tolist() for i, v in ops.items()}
          for kernel, ops in scalars.items()
      },
  }
  with open(os.path.join(directory, "case.json"), "w") as f:
    json.dump(record, f)
  try:
    text = compiled.as_text()
  except jax.errors.JaxRuntimeError:  # some async ops do not print; see analyse
    return
  with open(os.path.join(directory, "module.hlo"), "w") as f:
    f.write(text)


# --------------------------------------------------------------------------
# Schedules: parsing the bundles of one op
# --------------------------------------------------------------------------

_BUNDLE = re.compile(
    r"^ *(0x[0-9a-f]+|0) *(?:(?:L[HBE]|P[BF]|CT) *)*: *(?:> *)*\{", re.M)
_COMMENT = re.compile(r"/\*.*?\*/", re.S)
_CORE_ID = re.compile(r"sld \[smem:\[#allocation\d+\]\] /\* [^*]*core id[^*]*\*/")
_OP = re.compile(r"(?:%([a-z]*\d+)(?:_[a-z]+\d+)? = )?([a-z_][\w.\-]*)(.*)", re.S)
_PREDICATE = re.compile(r"\((!?)%(p\d+)(?:_p\d+)?(?:, ([^()]*))?\),?")
_NOTE = re.compile(r"\[(thread|resolvable|shape|kind)[^\]]*\]")
_OPERAND = re.compile(
    r"\[smem:\[([^\]]*)\]\]"
    r"|%([a-z]+\d+)(?:_[a-z]+\d+)?"
    r"|\[(#allocation\w+)(?: \+ \$?(0x[0-9a-f]+|\d+))?\]"
    r"|(?<![\w#%$.])(0x[0-9a-f]+|-?\d+)(?![\w.])"
)
_MASK = 0xFFFFFFFF
HBM_BASE = 0x80000000  # kernel operands get addresses from here on up
OPERAND_STRIDE = 0x01000000


def _signed(x: int) -> int:
  x &= _MASK
  return x - (1 << 32) if x & 0x80000000 else x


_ARITHMETIC = {
    "sadd": lambda a, b: a + b,
    "ssub": lambda a, b: a - b,
    "smul": lambda a, b: a * b,
    "smulhi": lambda a, b: (a * b) >> 32,
    "sand": lambda a, b: a & b,
    "sor": lambda a, b: a | b,
    "sxor": lambda a, b: a ^ b,
    "sshll": lambda a, b: a << (b & 31),
    "sshrl": lambda a, b: a >> (b & 31),
    "sshra": lambda a, b: _signed(a) >> (b & 31),
    "scalar_lea": lambda a, b: a + b,
}
_RELATION = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}


def _and(a, b):  # three-valued: None is unknown
  if a is False or b is False:
    return False
  return None if a is None or b is None else True


def _not(a):
  return None if a is None else not a


def _select(condition, yes, no):
  if condition is None:
    return yes if yes == no else None
  return yes if condition else no


_LOGIC = {
    "pneg": _not,
    "pand": _and,
    "pnand": lambda a, b: _not(_and(a, b)),
    "por": lambda a, b: _not(_and(_not(a), _not(b))),
    "pnor": lambda a, b: _and(_not(a), _not(b)),
    "pxor": lambda a, b: None if a is None or b is None else a != b,
    "scalar_select": _select,
}


def scalar_function(op: str) -> Callable | None:
  """The meaning of a scalar instruction, over ints, bools and None (unknown)."""
  head, _, kind = op.partition(".")
  if head in _LOGIC:
    return _LOGIC[head]
  if head in ("smov", "pmov"):
    total = lambda *a: a[0] if a else None  # a float literal does not parse
  elif head == "int_to_ptr":
    total = lambda *a: a[-1]
  elif head in _ARITHMETIC and not kind.startswith("f"):
    fn = _ARITHMETIC[head]
    total = lambda a, b, *_: fn(a & _MASK, b & _MASK) & _MASK
  elif head == "scmp" and kind.split(".")[1] in ("s32", "u32"):
    relation, kind = kind.split(".")[:2]
    fn, cast = _RELATION[relation], _signed if kind == "s32" else (lambda v: v & _MASK)
    total = lambda a, b: fn(cast(a), cast(b))
  elif head in ("smin", "smax") and kind in ("s32", "u32"):
    fn, cast = (min if head == "smin" else max), (
        _signed if kind == "s32" else (lambda v: v & _MASK))
    total = lambda a, b: fn(cast(a), cast(b)) & _MASK
  else:
    return None
  return lambda *a: None if None in a else total(*a)


@dataclasses.dataclass(slots=True)
class Instr:
  """One scalar, control or DMA instruction."""

  kind: str  # branch dma wait store load phi core operand value eval
  dst: str | None = None  # SSA name
  srcs: tuple = ()  # see parse_operands
  pred: str | None = None
  negated: bool = False
  old: Any = None  # what a skipped predicated move leaves behind
  target: int = 0  # of a branch
  fn: Callable | None = None  # of an eval
  ends: tuple[str, str] | None = None  # of a dma: memories, where its name says


@dataclasses.dataclass
class Schedule:
  """The bundles of one op."""

  code: list[list[Instr]]  # per bundle: what the walk has to execute
  matmuls: list[list[tuple[str, float]]]  # per bundle: (class, cycles an MXU is busy)
  slots: dict[str, int]  # slot class -> how many per bundle
  usage: list[dict[str, int]]  # per bundle: slots taken
  delay: int  # delay slots of a branch

  def __len__(self) -> int:
    return len(self.code)


class _Addresses(dict):
  """Gives every symbolic allocation an address of its own."""

  def __missing__(self, symbol: str) -> int:
    self[symbol] = 0x01000000 + 0x10000 * len(self)
    return self[symbol]


def parse_operands(text: str, addresses: _Addresses) -> tuple:
  """SSA names (str), numbers and addresses (int), ("mem", term, ...) references."""
  out = []
  for reference, name, symbol, offset, number in _OPERAND.findall(text):
    if reference:
      terms = []
      for term in reference.split("+"):
        term = term.strip().lstrip("$")
        if term.startswith("%"):
          terms.append(term[1:].partition("_")[0])
        else:
          terms.append(addresses[term] if term.startswith("#") else int(term, 0))
      out.append(("mem", *terms))
    elif name:
      out.append(name)
    elif symbol:
      out.append(addresses[symbol] + int(offset or "0", 0))
    else:
      out.append(int(number, 0))
  return tuple(out)


def parse_instr(text: str, addresses: _Addresses) -> Instr | None:
  """An instruction the walk may need, or None (vector work, assertions)."""
  match = _OP.match(text)
  if not match:
    return None
  dst, op, rest = match.groups()
  if op == "core_id":
    return Instr("core", dst)
  if op.startswith("inlined_call_operand"):
    index = re.search(r"index: (\d+)", rest)
    kind = "value" if "no memory space" in rest else "operand"
    return Instr(kind, dst, (int(index.group(1)) if index else 0,))
  instr = Instr("eval", dst)
  predicate = _PREDICATE.search(rest)
  if predicate:
    instr.negated, instr.pred = predicate.group(1) == "!", predicate.group(2)
    if predicate.group(3):
      instr.old = parse_operands(predicate.group(3), addresses)[0]
    rest = rest[: predicate.start()] + " " + rest[predicate.end() :]
  if op == "sbr.rel":
    instr.kind = "branch"
    instr.target = int(re.search(r"bundleno = (\d+)", rest).group(1))
    return instr
  if op.startswith(("dma.done", "vwait")):
    instr.kind = "wait"
  elif op.startswith("dma."):
    instr.kind = "dma"
    ends = re.match(r"dma\.(\w+?)_to_(\w+)", op)
    instr.ends = ends.groups() if ends else None
  elif op in ("sphi", "pphi"):
    instr.kind = "phi"
  elif op == "sst":
    instr.kind = "store"
  elif op == "sld":
    instr.kind = "load"
  else:
    instr.fn = scalar_function(op)
    if instr.fn is None and not (dst and dst[0] in "sp"):
      return None
  instr.srcs = parse_operands(_NOTE.sub("", rest), addresses)
  return instr


def matmul_classes(text: str) -> list[str]:
  """MXU instructions in a bundle, in the vocabulary of libtpu's profile."""
  out = []
  for what, suffix in re.findall(r"\bvmat(mul|push\d?)\.([\w.]+)", text):
    kind = "matmul" if what == "mul" else "matpush"
    parts = suffix.split(".")
    if "lmr" in parts:
      tail = ""
    elif {"bf16", "f16", "hf16"}.intersection(parts):
      tail = "_packed" if kind == "matmul" else "_bf16_packed"
    elif any(re.fullmatch(r"[su][48]|f8\w*|e[45]m\w*|[bh]f8", p) for p in parts):
      tail = "_x8_packed" if kind == "matmul" else "_s8_packed"
    else:
      tail = ""
    out.append(kind + tail)
  return out


def _needed(code: list[list[Instr]]) -> list[list[Instr]]:
  """Drops instructions that feed neither branches nor DMAs nor SMEM."""
  definitions = collections.defaultdict(list)
  todo = []
  for bundle in code:
    for instr in bundle:
      if instr.dst:
        definitions[instr.dst].append(instr)
      if instr.kind in ("branch", "dma", "wait", "store"):
        todo.append(instr)
  keep = set()
  while todo:
    instr = todo.pop()
    if id(instr) in keep:
      continue
    keep.add(id(instr))
    names = [instr.pred, instr.old]
    for src in instr.srcs:
      names.extend(src[1:] if isinstance(src, tuple) else (src,))
    for name in names:
      if isinstance(name, str):
        todo.extend(definitions[name])
  return [[i for i in bundle if id(i) in keep] for bundle in code]


def parse_schedule(path: str, usage_path: str | None,
                   occupancy: dict[str, float]) -> Schedule:
  with open(path) as f:
    text = f.read()
  text = _CORE_ID.sub("core_id", text)
  text = _COMMENT.sub(lambda m: "/*end*/" if "End region" in m.group(0) else "", text)
  marks = list(_BUNDLE.finditer(text))
  addresses = _Addresses()
  code, matmuls, region_ends = [], [], []
  for i, mark in enumerate(marks):
    if int(mark.group(1), 16) != i:
      raise RuntimeError(f"{path}: bundle {mark.group(1)} found in place {i}")
    body = text[mark.end() : marks[i + 1].start() if i + 1 < len(marks) else None]
    if "/*end*/" in body:
      region_ends.append(i)
      body = body.replace("/*end*/", "")
    parts = body[: body.rfind("}")].split(";;")
    bundle = [parse_instr(p.strip(), addresses) for p in parts]
    bundle = [i for i in bundle if i]
    # A phi reads what the previous iteration left: first.  A pointer cast may
    # name a value that its own bundle computes: last.
    order = lambda i: 0 if i.kind == "phi" else 2 if len(i.srcs) == 1 and i.fn else 1
    code.append(sorted(bundle, key=order))
    matmuls.append([(c, occupancy.get(c, 0.0)) for c in matmul_classes(body)])
  # A branch takes effect after its delay slots, where its region ends.
  distance = collections.Counter()
  for i, bundle in enumerate(code):
    if any(instr.kind == "branch" for instr in bundle):
      at = bisect.bisect_left(region_ends, i)
      if at < len(region_ends) and region_ends[at] - i < 16:
        distance[region_ends[at] - i] += 1
  slots, usage = {}, []
  if usage_path:
    with open(usage_path) as f:
      lines = f.read().splitlines()
    names = [s.strip() for s in lines[1].split(",")]
    slots = dict(zip(names, map(int, lines[2].split())))
    usage = [dict(zip(names, map(int, line.split()))) for line in lines[4:]]
  usage += [{}] * (len(code) - len(usage))
  return Schedule(
      code=_needed(code), matmuls=matmuls, slots=slots, usage=usage,
      delay=distance.most_common(1)[0][0] if distance else 4)


def mxu_occupancy(path: str | None) -> dict[str, float]:
  """Cycles an MXU instruction of each class keeps its unit busy.

  libtpu's static profile prints, for every region, how many instructions of a
  class would have fitted: bundles of the region / cycles per instruction.
  """
  size, best = 0, {}
  if path:
    with open(path) as f:
      regions = f.read().split("\nHLO: ")
    for region in regions:
      total = re.search(r"SMEM_SPILL_COUNT: \(\d+/(\d+)\)", region)
      if total and int(total.group(1)) > size:
        size = int(total.group(1))
        fits = re.findall(r"- MXU_0 (\w+): \(\d+/(\d+)\)", region)
        best = {cls: max(1, round(size / int(n))) for cls, n in fits if int(n)}
  return best


# --------------------------------------------------------------------------
# Walking a schedule
# --------------------------------------------------------------------------


class Walk:
  """One TensorCore executing the scalar side of a schedule."""

  MAX_STEPS = 20_000_000

  def __init__(self, schedule: Schedule, chip: Chip, core: int, latency: float,
               scalars: dict[int, list[int]], trips: dict[int, int]):
    self.schedule, self.chip, self.core = schedule, chip, core
    self.latency, self.scalars, self.trips = latency, scalars, trips
    self.issue = self.stall = 0.0  # cycles
    self.channel = 0.0  # when the HBM channel is free again
    self.bytes = {"read": 0, "write": 0}
    self.dmas = 0
    self.unresolved = collections.Counter()
    self.truncated = False
    self.counts: list[int] = []  # per bundle: executions
    self._registers: dict[str, Any] = {}
    self._written: dict[str, int] = {}  # step of the last write
    self._memory: dict[int, Any] = {}  # SMEM
    self._queues = collections.defaultdict(collections.deque)  # flag -> DMAs
    self._steps = 0
    self._back_edge = False  # how the current bundle was reached
    self._taken = collections.Counter()  # branch address -> times taken
    self._passed = collections.Counter()  # ... and not taken
    self._branches = [(at, instr) for at, bundle in enumerate(schedule.code)
                      for instr in bundle if instr.kind == "branch"]
    self._headers = {i.target for at, i in self._branches if i.target <= at}
    for index, values in scalars.items():
      base = HBM_BASE + OPERAND_STRIDE * index
      for i, v in enumerate(values):  # as an SMEM address and as a DMA address
        for address in (base + i, ((base << 4) & _MASK) + i):
          self._memory[address] = int(v) & _MASK
    self._run()

  @property
  def est(self) -> float:
    return self.issue + self.stall

  def loops(self) -> list[dict]:
    out = []
    for at, instr in self._branches:
      if instr.target <= at:
        end = min(len(self.schedule), at + self.schedule.delay + 1)
        out.append({
            "start": instr.target, "end": end, "size": end - instr.target,
            "trips": self.counts[instr.target],
            "cycles": sum(self.counts[instr.target : end]),
        })
    return out

  def regions(self) -> list[dict]:
    out = []
    for at, instr in self._branches:
      start = at + self.schedule.delay + 1
      if instr.target > at:
        out.append({
            "start": start, "end": instr.target, "size": instr.target - start,
            "reached": self._taken[at] + self._passed[at],
            "run": self._passed[at],
        })
    return out

  def _value(self, src):
    return self._registers.get(src) if isinstance(src, str) else src

  def _address(self, reference) -> int | None:
    terms = [self._value(t) for t in reference[1:]]
    return None if None in terms else sum(terms) & _MASK

  def _run(self) -> None:
    code, delay, size = self.schedule.code, self.schedule.delay, len(self.schedule)
    active = [at for at, bundle in enumerate(code) if bundle]
    changes = [0] * (size + 1)  # execution counts, as differences
    pc = 0
    while pc < size and not self.truncated:
      changes[pc] += 1
      jump = None
      while jump is None and pc < size:  # a straight run, up to a taken branch
        at = bisect.bisect_left(active, pc)
        at = active[at] if at < len(active) else size
        self.issue += at - pc
        pc = at
        if pc < size:
          jump = self._execute(pc)
          self._back_edge = False
          self.issue += 1
          pc += 1
      if jump is not None:
        for pc in range(pc, min(size, pc + delay)):
          late = self._execute(pc)
          jump = jump if late is None else late
          self.issue += 1
          pc += 1
        self._back_edge = jump < pc
      changes[pc] -= 1
      pc = size if jump is None else jump
      self.truncated = self._steps > self.MAX_STEPS
    running = 0
    for change in changes[:size]:
      running += change
      self.counts.append(running)

  def _execute(self, at: int) -> int | None:
    """Runs the instructions of one bundle; returns where to jump, if at all."""
    jump = None
    for instr in self.schedule.code[at]:
      self._steps += 1
      on = True
      if instr.pred is not None:
        on = self._registers.get(instr.pred)
        on = _not(on) if instr.negated else on
      kind = instr.kind
      if kind == "branch":
        if self._branch(at, instr, on):
          jump = instr.target
        continue
      if on is False and kind in ("dma", "wait", "store"):
        continue
      if kind == "dma":
        self._start_dma(instr)
        continue
      if kind == "wait":
        self._wait(instr)
        continue
      if kind == "store":
        address = self._address(instr.srcs[0]) if instr.srcs else None
        if address is not None:
          known = on and len(instr.srcs) > 1
          self._memory[address] = self._value(instr.srcs[1]) if known else None
        continue
      if on is False:
        if instr.old is None:
          continue
        result = self._value(instr.old)
      else:
        result = self._result(at, instr)
        if on is None and instr.old is not None and result != self._value(instr.old):
          result = None
      self._registers[instr.dst] = result
      self._written[instr.dst] = self._steps
    return jump

  def _result(self, at: int, instr: Instr):
    kind = instr.kind
    if kind == "eval":
      if instr.fn is None:
        return None
      return instr.fn(*[self._value(s) for s in instr.srcs])
    if kind == "phi":
      names = [s for s in instr.srcs if isinstance(s, str)]
      if at in self._headers and len(names) == 2:
        return self._registers.get(names[1 if self._back_edge else 0])
      latest = max(names, key=lambda n: self._written.get(n, -1), default=None)
      return self._registers.get(latest)
    if kind == "load":
      return self._memory.get(self._address(instr.srcs[0])) if instr.srcs else None
    if kind == "core":
      return self.core
    index = instr.srcs[0]
    if kind == "operand":
      return HBM_BASE + OPERAND_STRIDE * index
    return int(self.scalars[index][0]) & _MASK if index in self.scalars else None

  def _branch(self, at: int, instr: Instr, taken: bool | None) -> bool:
    if taken is None:
      self.unresolved[f"branch@{at:#x}"] += 1
      # Of an unknown forward branch, run the region; of an unknown loop, do the
      # iterations the user asked for.
      taken = instr.target <= at and self._taken[at] + 1 < self.trips.get(
          instr.target, 0)
    (self._taken if taken else self._passed)[at] += 1
    return taken

  def _start_dma(self, instr: Instr) -> None:
    values = [self._value(s) for s in instr.srcs]
    values += [None] * (4 - len(values))
    source, size, destination, flag = values[:4]
    if instr.ends:
      ends = instr.ends
    else:  # dma.general: the addresses tell the direction
      outbound = destination is not None and destination >= HBM_BASE
      inbound = source >= HBM_BASE if source is not None else not outbound
      ends = "hbm" if inbound else "vmem", "hbm" if outbound else "vmem"
    if size is None:
      self.unresolved["dma size"] += 1
    size = 0 if size is None or size >= 1 << 28 else size * self.chip.granule
    now = self.est
    if "hbm" in ends:
      rate = self.chip.bytes_per_cycle * self.chip.hbm_efficiency
      self.channel = max(self.channel, now) + size / rate
      now = self.channel
      if ends[0] == "hbm":
        self.bytes["read"] += size
      if ends[1] == "hbm":
        self.bytes["write"] += size
    if ends[1] == "smem" and source is not None and destination is not None:
      for k in range(size // 4):
        if source + k in self._memory:
          self._memory[destination + k] = self._memory[source + k]
    self._queues[flag].append([now + self.latency, size])
    self.dmas += 1

  def _wait(self, instr: Instr) -> None:
    values = [self._value(s) for s in instr.srcs] + [None, None]
    flag, amount = values[0], (values[1] or 0) * self.chip.granule
    if flag is None:
      self.unresolved["wait"] += 1
      return
    queue = self._queues[flag]
    while queue:
      done, size = queue[0]
      self.stall += max(0.0, done - self.est)
      if size > amount > 0:
        queue[0][1] -= amount
        return
      amount -= size
      queue.popleft()
      if amount <= 0:
        return


# --------------------------------------------------------------------------
# HLO: how often each op runs
# --------------------------------------------------------------------------

_DTYPE_BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2,
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8,
}


@dataclasses.dataclass
class Hlo:
  """One HLO instruction."""

  name: str
  type: str
  opcode: str
  operands: list[str]  # of a constant: its text
  attributes: str

  def attribute(self, *names: str) -> str | None:
    """The computation named by the first of these attributes that is there."""
    for name in names:
      match = re.search(rf"\b{name}=%([\w.\-<>]+)", self.attributes)
      if match:
        return match.group(1)
    return None

  @property
  def integer(self) -> int | None:
    if self.opcode == "constant" and re.fullmatch(r"-?\d+", self.operands[0]):
      return int(self.operands[0])
    return None


def shape_bytes(text: str, which: int = 0) -> int:
  """Bytes of one of the array shapes in `text`, the first unless told."""
  shapes = re.findall(r"([a-z]\w*)\[([\d,]*)\]", text)
  if which >= len(shapes):
    return 0
  dtype, dims = shapes[which]
  return _DTYPE_BYTES.get(dtype, 1) * math.prod(int(d) for d in dims.split(",") if d)


def _closing(text: str, start: int) -> int:
  """The end of the bracketed text that opens at `start`."""
  depth = 0
  for i in range(start, len(text)):
    depth += (text[i] in "([{") - (text[i] in ")]}")
    if depth == 0:
      return i + 1
  return len(text)


def parse_hlo(text: str) -> tuple[str, dict[str, list[Hlo]]]:
  """The entry's name, and the instructions of every computation."""
  computations, entry, current = {}, "", []
  for line in text.splitlines():
    head = re.match(r"^(ENTRY )?%?([\w.\-<>]+) \(.*\) -> .*\{$", line)
    if head:
      current = computations.setdefault(head.group(2), [])
      entry = head.group(2) if head.group(1) else entry
      continue
    match = re.match(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*)$", line)
    if not match:
      continue
    name, rest = match.groups()
    end = _closing(rest, 0) if rest.startswith("(") else rest.find(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    open_ = rest.find("(")
    close = _closing(rest, open_)
    opcode, inside = rest[:open_], rest[open_ + 1 : close - 1]
    operands = [inside] if opcode == "constant" else re.findall(r"%([\w.\-]+)", inside)
    current.append(Hlo(name, kind, opcode, operands, rest[close:]))
  return entry, computations


def trip_count(loop: Hlo, caller: list[Hlo], computations) -> int | None:
  """Count the iterations of a while whose counter has constant bounds and step.
  """
  known = re.search(r"known_trip_count[^\d]*(\d+)", loop.attributes)
  if known:
    return int(known.group(1))
  condition = computations.get(loop.attribute("condition"), [])
  body = computations.get(loop.attribute("body"), [])
  outside = {h.name: h for h in caller}
  scope = {h.name: h for h in condition}
  fusion = condition[-1] if condition and condition[-1].opcode == "fusion" else None
  inner = computations.get(fusion.attribute("calls"), []) if fusion else condition
  compare = next((h for h in inner if h.opcode == "compare"), None)
  carried = outside.get(loop.operands[0]) if loop.operands else None
  if compare is None:
    return None

  def resolve(name):
    """(constant value or None, index in the carried tuple or None)"""
    h = next((h for h in inner if h.name == name), None) or scope.get(name)
    if fusion and h is not None and h.opcode == "parameter":
      number = re.search(r"param_(\d+)", name)
      h = scope.get(fusion.operands[int(number.group(1))]) if number else None
    if h is None or h.integer is not None:
      return (h.integer if h else None), None
    if h.opcode != "get-tuple-element":
      return None, None
    index = int(re.search(r"index=(\d+)", h.attributes).group(1))
    start = None
    if carried is not None and carried.opcode == "tuple":
      start = outside.get(carried.operands[index])
      while start is not None and start.opcode in ("copy", "bitcast"):
        start = outside.get(start.operands[0])
    return (start.integer if start else None), index

  start, counter = resolve(compare.operands[0])
  stop, _ = resolve(compare.operands[1])
  if stop is None:
    return None
  step = 1
  produced = {h.name: h for h in body}
  if counter is not None and body and body[-1].opcode == "tuple":
    add = produced.get(body[-1].operands[counter])
    if add is not None and add.opcode == "add":
      steps = [produced[n].integer for n in add.operands if n in produced]
      step = next((abs(s) for s in steps if s), 1)
  span = abs(stop - (start or 0)) + ("direction=LE" in compare.attributes)
  return math.ceil(span / step)


def op_runs(text: str, trips: dict[str, int]):
  """Op name -> (runs, instruction), and notes on loops of unknown length."""
  entry, computations = parse_hlo(text)
  runs, notes = {}, []

  def visit(name, times):
    ops = computations.get(name, [])
    for h in ops:
      runs[h.name] = runs.get(h.name, (0, h))[0] + times, h
      if h.opcode == "while":
        trip = trips.get(h.name) or trip_count(h, ops, computations)
        if trip is None:
          notes.append(f"while {h.name}: trip count unknown, taken as 1")
          trip = 1
        visit(h.attribute("body"), times * trip)
        visit(h.attribute("condition"), times * (trip + 1))
      elif h.opcode == "conditional":
        notes.append(f"conditional {h.name}: every branch counted")
        listed = re.search(r"branch_computations=\{([^}]*)\}", h.attributes)
        names = re.findall(r"%([\w.\-<>]+)", listed.group(1)) if listed else [
            h.attribute("true_computation"), h.attribute("false_computation")]
        for name in names:
          visit(name, times)
      elif h.opcode in ("call", "async-start"):
        visit(h.attribute("to_apply", "calls"), times)

  visit(entry, 1)
  return runs, notes


# --------------------------------------------------------------------------
# Putting a program together
# --------------------------------------------------------------------------

SLOTS = ("XLU", "VALU", "EUP", "VLOAD", "VSTORE", "SALU")
NOT_RUN = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while",
    "conditional", "call", "after-all", "partition-id", "replica-id",
}


def dump_files(directory: str) -> dict[str, dict[str, str]]:
  """Op name -> {pass name -> newest file}."""
  files = collections.defaultdict(dict)
  for path in sorted(glob.glob(os.path.join(glob.escape(directory), "*.txt"))):
    match = re.match(r"\d+-(.*)-\d+-([a-zA-Z][\w\-]*)\.txt$", os.path.basename(path))
    if match:
      files[match.group(1)][match.group(2)] = path
  return files


def shared_code(path: str | None) -> dict[str, str]:
  """Op -> the op whose identical code it runs."""
  out, key = {}, ""
  if path:
    with open(path) as f:
      for line in f:
        if line.startswith("key:"):
          key = line[4:].strip()
        elif line.startswith("  "):
          out[line.strip()] = key
  return out


def busiest_loop(schedule: Schedule, walk: Walk, chip: Chip) -> dict:
  """Slot use in the costliest loop, or in the whole op if it has none."""
  lo, hi, trips = 0, len(schedule), 1
  loops = walk.loops()
  if loops:
    most = max(l["cycles"] for l in loops)
    best = min((l for l in loops if l["cycles"] >= 0.9 * most), key=lambda l: l["size"])
    lo, hi, trips = best["start"], best["end"], max(1, best["trips"])
  used, mxu = collections.Counter(), collections.Counter()
  for at in range(lo, hi):
    runs = walk.counts[at]
    if runs:
      for slot, taken in schedule.usage[at].items():
        used[slot] += runs * taken
      for cls, busy in schedule.matmuls[at]:
        mxu[cls.split("_")[0]] += runs * busy
  cycles = sum(walk.counts[lo:hi]) or 1
  share = {s: used[s] / (cycles * (schedule.slots.get(s) or 1)) for s in SLOTS}
  share["MXU"] = mxu["matmul"] / (cycles * chip.mxus)
  share["push"] = mxu["matpush"] / (cycles * chip.mxus)
  spills = used["VLOAD:FILL"] + used["VSTORE:SPILL"]
  return {"trips": trips, "cycles": cycles, "share": share, "spill": spills / trips}


def analyse_op(hlo: Hlo, times: int, schedule: Schedule, walks: list[Walk],
               chip: Chip) -> dict:
  worst = max(walks, key=lambda w: w.est)
  loop = busiest_loop(schedule, worst, chip)
  streaming = sum(
      runs * busy for at, runs in enumerate(worst.counts)
      for cls, busy in schedule.matmuls[at] if cls.startswith("matmul"))
  xla = re.search(r'"estimated_cycles":"(\d+)"', hlo.attributes)
  vmem = re.search(
      r'used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+",'
      r'"size":"(\d+)"', hlo.attributes)
  read, write = (sum(w.bytes[k] for w in walks) for k in ("read", "write"))
  return {
      "op": hlo.name, "opcode": hlo.opcode, "n": times, "bundles": len(schedule),
      "issue": times * worst.issue, "est": times * worst.est,
      "issue_per_core": [w.issue for w in walks],
      "trips": loop["trips"], "cycles_per_trip": loop["cycles"] / loop["trips"],
      "outside_loop": worst.issue - loop["cycles"],
      "xla": times * int(xla.group(1)) if xla else None,
      "mxu_cycles": times * streaming / chip.mxus,
      "share": loop["share"], "spill": loop["spill"],
      "hbm_read": times * read, "hbm_write": times * write,
      "hbm_bytes": times * (read + write),
      "dmas": times * sum(w.dmas for w in walks),
      "vmem": int(vmem.group(1)) if vmem else None,
      "loops": worst.loops(), "regions": worst.regions(),
      "unresolved": [f"{k} x{v}" for k, v in worst.unresolved.items()],
      "truncated": worst.truncated,
  }


def analyse(directory: str, latency_ns: float, efficiency: float | None,
            trips: dict[str, int]) -> dict:
  """Everything known about one compiled case."""
  with open(os.path.join(directory, "case.json")) as f:
    case = json.load(f)
  chip = Chip(**case.pop("chip"))
  chip.hbm_efficiency = efficiency or chip.hbm_efficiency
  # The dump lacks what the printed module says of VMEM and estimated cycles.
  module = os.path.join(directory, "module.hlo")
  if not os.path.exists(module):
    module = max(glob.glob(os.path.join(glob.escape(directory), "*-TLP-hlo.txt")))
  with open(module) as f:
    runs, notes = op_runs(f.read(), trips)
  files = dump_files(directory)
  top = files.get("TLP", {})
  occupancy = mxu_occupancy(top.get(PROFILE))
  shared = shared_code(top.get(SHARED))
  scalars = case.pop("scalars")
  walked, ops, async_bytes = {}, [], 0
  for name, (times, hlo) in runs.items():
    if hlo.opcode == "copy-start":  # (destination, source, context)
      async_bytes += times * shape_bytes(hlo.type)
    elif hlo.opcode.endswith("slice-start"):  # ((source), destination, context)
      async_bytes += times * shape_bytes(hlo.type, 1)
    dump = files.get(shared.get(name, name)) or files.get(name, {})
    if hlo.opcode in NOT_RUN or hlo.opcode.endswith("-done") or SCHEDULE not in dump:
      continue
    if dump[SCHEDULE] not in walked:
      schedule = parse_schedule(dump[SCHEDULE], dump.get(USAGE), occupancy)
      values, bounds = {}, {}
      if hlo.opcode == "custom-call":
        best = max((k for k in scalars if k in name), key=len, default=None)
        values = {int(k): v for k, v in scalars.get(best, {}).items()}
      for key, n in trips.items():
        op, _, address = key.partition("@")
        if op == name and address:
          bounds[int(address, 0)] = n
      walked[dump[SCHEDULE]] = schedule, [
          Walk(schedule, chip, core, latency_ns * 1e-9 * chip.hz, values, bounds)
          for core in range(chip.cores)]
    ops.append(analyse_op(hlo, times, *walked[dump[SCHEDULE]], chip))
  ops.sort(key=lambda o: -o["est"])
  total = lambda key: sum(o[key] or 0 for o in ops)
  flops = case["flops"] or case["xla_flops"] or 0
  moved = case["bytes"] or case["args_bytes"] + case["out_bytes"]
  traffic = total("hbm_bytes") + async_bytes
  channel = chip.bytes_per_cycle * chip.cores
  est = max(total("est"), traffic / (channel * chip.hbm_efficiency))
  roof_mxu = flops / (chip.flops_per_cycle * chip.cores)
  roof_hbm = moved / channel
  roof = max(roof_mxu, roof_hbm) or float("nan")
  return {
      **case, "flops": flops, "bytes": moved,
      "chip": dataclasses.asdict(chip), "hz": chip.hz, "ops": ops, "notes": notes,
      "issue": total("issue"), "est": est, "est_seconds": est / chip.hz,
      "xla_cycles": total("xla"), "mxu_cycles": total("mxu_cycles"),
      "hbm_bytes": traffic, "async_bytes": async_bytes,
      "roof_mxu": roof_mxu, "roof_hbm": roof_hbm,
      "roofline_ratio": est / roof, "issue_ratio": total("issue") / roof,
  }


# --------------------------------------------------------------------------
# Report
# --------------------------------------------------------------------------


def _si(x: float | None, unit: str = "") -> str:
  if x is None:
    return "-"
  for scale, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
    if abs(x) >= scale:
      return f"{x / scale:.3g}{letter}{unit}"
  return f"{x:.4g}{unit}"


def print_report(r: dict, top: int, loops: bool) -> None:
  print(f"\n=== {r['name']} on {r['target']} ({r['device_kind']},"
        f" {r['chip']['cores']} core(s), {r['hz'] / 1e9:.2f} GHz, jax {r['jax']})")
  shares = ("MXU", "push") + SLOTS
  rows = [("op", "n", "bundles", "trips", "cyc/it", "issue", "est", "xla", *shares,
           "spill", "HBM", "VMEM")]
  for o in r["ops"][:top]:
    star = "*" if o["unresolved"] or o["truncated"] else ""
    rows.append((
        o["op"][:40] + star, str(o["n"]), str(o["bundles"]), str(o["trips"]),
        _si(o["cycles_per_trip"]), _si(o["issue"]), _si(o["est"]), _si(o["xla"]),
        *(f"{o['share'][s]:.0%}" for s in shares),
        _si(o["spill"]), _si(o["hbm_bytes"], "B"), _si(o["vmem"], "B")))
  widths = [max(map(len, column)) for column in zip(*rows)]
  for row in rows:
    cells = [row[0].ljust(widths[0])]
    print("  ".join(cells + [c.rjust(w) for c, w in zip(row[1:], widths[1:])]))
  if r["ops"][top:]:
    rest = sum(o["est"] for o in r["ops"][top:])
    print(f"... and {len(r['ops']) - top} more ops: {_si(rest)} cycles")
  for o in r["ops"][:3] if loops else []:
    print(f"  {o['op']}: {_si(o['outside_loop'])} cycles outside its busiest loop")
    for l in o["loops"]:
      print(f"    loop {l['start']:#x}..{l['end']:#x}: {l['size']} bundles,"
            f" {l['trips']} trips, {_si(l['cycles'])} cycles")
    for g in sorted(o["regions"], key=lambda g: -g["size"] * g["reached"])[:8]:
      print(f"    if   {g['start']:#x}..{g['end']:#x}: {g['size']} bundles,"
            f" run {g['run']} of {g['reached']}")
  for o in r["ops"]:
    if o["unresolved"] or o["truncated"]:
      print(f"  * {o['op']}: " + ", ".join(
          ["walk cut short"] * o["truncated"] + o["unresolved"][:6]))
  for note in r["notes"]:
    print(f"  note: {note}")
  print(f"program: issue {_si(r['issue'])} cycles, est {_si(r['est'])} cycles ="
        f" {r['est_seconds'] * 1e3:.4g} ms; MXU busy {_si(r['mxu_cycles'])}"
        f" ({r['mxu_cycles'] / max(1, r['est']):.0%});"
        f" HBM traffic {_si(r['hbm_bytes'], 'B')}")
  print(f"roofline: {_si(r['flops'])} flops -> {_si(r['roof_mxu'])} cycles,"
        f" {_si(r['bytes'], 'B')} -> {_si(r['roof_hbm'])} cycles;"
        f" est/roofline {r['roofline_ratio']:.2f},"
        f" issue/roofline {r['issue_ratio']:.2f}")
  optimal = r["optimal_seconds"] or 0
  print(f"memory: args {_si(r['args_bytes'], 'B')}, out {_si(r['out_bytes'], 'B')},"
        f" temp {_si(r['temp_bytes'], 'B')}; XLA says:"
        f" optimal {f'{optimal * 1e3:.4g} ms' if optimal > 0 else '-'},"
        f" flops {_si(r['xla_flops'])}, bytes {_si(r['xla_bytes'])}"
        " (while bodies counted once)")


def run_child(spec: str, index: int, target: str, directory: str, flags) -> None:
  """Compiles in a fresh process: libtpu reads its flags once."""
  shutil.rmtree(directory, ignore_errors=True)
  os.makedirs(directory)
  env = dict(os.environ)
  # No TPU is touched, so neither the metadata server nor the one-process-per-TPU
  # lock has a say here.
  env.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1",
             JAX_PLATFORMS="cpu")
  env.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
  env.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  env["LIBTPU_INIT_ARGS"] = " ".join(
      [env.get("LIBTPU_INIT_ARGS", ""), DUMP_FLAGS.format(dir=directory), *flags])
  done = subprocess.run(
      [sys.executable, os.path.abspath(__file__), "--child", spec, str(index),
       target, directory],
      env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
  if done.returncode:
    tail = "\n".join(line[:500] for line in done.stdout.splitlines()[-12:])
    raise RuntimeError(f"compiling {spec} for {target} failed:\n{tail}")
  for path in glob.glob(os.path.join(glob.escape(directory), "*.txt")):
    if not path.endswith(KEPT_DUMPS):  # some 70 passes are dumped, 75 MB and more
      os.remove(path)


def main(argv: list[str]) -> int:
  if argv[:1] == ["--child"]:
    compile_case(argv[1], int(argv[2]), *argv[3:])
    return 0
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
      usage="tpu_static.py SPEC [SPEC ...] [--target v5p,v6e] [options]")
  hide = argparse.SUPPRESS  # the docstring tells
  parser.add_argument("specs", nargs="+", help=hide)
  parser.add_argument("--target", default="v5p,v6e", help=hide)
  parser.add_argument("--top", type=int, default=12, help=hide)
  parser.add_argument("--loops", action="store_true", help=hide)
  parser.add_argument("--trip", action="append", default=[], help=hide)
  parser.add_argument("--dma-latency", type=float, default=450.0, help=hide)
  parser.add_argument("--hbm-efficiency", type=float, help=hide)
  parser.add_argument("--xla-flag", action="append", default=[], help=hide)
  parser.add_argument("--json", help=hide)
  parser.add_argument("--keep", help=hide)
  parser.add_argument("--reuse", action="store_true", help=hide)
  args = parser.parse_args(argv)
  targets = args.target.split(",")
  for target in targets:
    if target not in TOPOLOGY:
      parser.error(f"unknown target {target}; known: {', '.join(TOPOLOGY)}")
  trips = {k: int(v) for k, _, v in (t.rpartition("=") for t in args.trip)}
  os.environ["JAX_PLATFORMS"] = "cpu"  # specs may compute on the way
  base = os.path.abspath(args.keep or tempfile.mkdtemp(prefix="tpu_static_"))
  results, failed = [], 0
  try:
    for spec in args.specs:
      for index, case in enumerate(load_cases(spec)):
        for target in targets:
          slug = re.sub(r"[^\w.\-]", "_", f"{case['name']}.{target}")
          directory = os.path.join(base, slug)
          try:
            done = os.path.exists(os.path.join(directory, "case.json"))
            if not (args.reuse and done):
              run_child(spec, index, target, directory, args.xla_flag)
            result = analyse(directory, args.dma_latency, args.hbm_efficiency, trips)
          except RuntimeError as e:
            failed += 1
            print(f"\n=== {case['name']} on {target}: FAILED\n{e}", flush=True)
            continue
          finally:
            if not args.keep:
              shutil.rmtree(directory, ignore_errors=True)
          results.append(result)
          print_report(result, args.top, args.loops)
          sys.stdout.flush()
  finally:
    if not args.keep:
      shutil.rmtree(base, ignore_errors=True)
  if args.json:
    with open(args.json, "w") as f:
      json.dump(results, f, indent=1)
  return 1 if failed else 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))

"""Named cases of grouped_swiglu: those of grouped_matmul, for two matrices."""

import dataclasses

from mom_jax.pallas.grouped_matmul import cases

CASES = {
    name: dataclasses.replace(case, hidden=2 * case.hidden)
    for name, case in cases.CASES.items()
}
# The quickstart's experts.
BENCHMARKS = {name: cases.BENCHMARKS[name] for name in ('moma_in', 'skewed')}

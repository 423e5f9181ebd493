"""All rows of the table, in its order."""

from __future__ import annotations

from benchmarks import (
    adam_step,
    each_optimizer,
    gpu,
    import_time,
    learned_step,
    memory,
    meta_step,
    own_rule,
    update_alone,
    vmap_step,
)


ROWS = [
    row
    for workload in (
        meta_step,
        learned_step,
        vmap_step,
        update_alone,
        adam_step,
        each_optimizer,
        own_rule,
        memory,
        gpu,
        import_time,
    )
    for row in workload.ROWS
]
#: What ``--only`` takes.
KEYS = list(dict.fromkeys(row.key for row in ROWS))

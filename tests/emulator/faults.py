"""Mistakes to plant in the kernels, each as a change of their text: the emulator is worth what it finds of them."""

from __future__ import annotations

import re
from typing import NamedTuple


class Fault(NamedTuple):
    """`old` becomes `new` in a file of csrc/cuda, `times` times as often as it occurs. A space is any white space."""

    name: str
    file: str
    old: str
    new: str
    times: int = 1
    width: int = 128  # of the heads that kernels with the fault are run on

    def planted(self, text: str) -> str:
        """The text of the file with the fault in it."""
        pattern = r"\s+".join(map(re.escape, self.old.split()))
        changed, times = re.subn(pattern, lambda _: self.new, text)
        assert times == self.times, f"{self.name}: its text occurs {times} times"
        return changed


FORWARD, BACKWARD = "kernels/forward.h", "kernels/backward.h"
SCORES, GRADIENTS = "kernels/backward_scores.h", "kernels/backward_gradients.h"
TILE, VISIBILITY = "kernels/tile.h", "kernels/visibility.h"

FAULTS = (
    # Descriptors and fragments.
    Fault(
        "step along columns",
        TILE,
        "k % 4 * 32)",
        "k % 4 * 64)",
    ),
    Fault(
        "step along rows",
        TILE,
        "k * 16 * kRowBytes",
        "k * 8 * kRowBytes",
    ),
    Fault(
        "leading distance of values",
        FORWARD,
        "layout.values(0), kKeys * kRowBytes",
        "layout.values(0), kRowBytes",
    ),
    Fault(
        "rows of a warpgroup",
        FORWARD,
        "layout.queries() + warpgroup * 64",
        "layout.queries() + warpgroup * 32",
    ),
    Fault(
        "order of fragments",
        FORWARD,
        "P + 4 * i",
        "P + 4 * (i ^ 1)",
    ),
    Fault(
        "stage of keys",
        FORWARD,
        "key_ring.stage * (Layout::kKeyBytes >> 4)",
        "0 * (Layout::kKeyBytes >> 4)",
    ),
    Fault(
        "leading distance of queries",
        GRADIENTS,
        "layout.queries(0), kQueries * kRowBytes",
        "layout.queries(0), 16",
    ),
    Fault(
        "halves of the keys",
        GRADIENTS,
        "kSplitsColumns ? half : 0)",
        "kSplitsColumns ? 0 : 0)",
    ),
    # Phases.
    Fault(
        "phase of the consumer's keys",
        FORWARD,
        "key_ring{0, 0}",
        "key_ring{0, 1}",
    ),
    Fault(
        "phase of the producer's values",
        FORWARD,
        "value_ring{0, 1}",
        "value_ring{0, 0}",
    ),
    Fault(
        "phase that never turns",
        TILE,
        "parity ^= 1;",
        "",
    ),
    Fault(
        "phase of the queries",
        FORWARD,
        "query_parity ^= 1;",
        "",
        2,
    ),
    Fault(
        "phase of dO",
        BACKWARD,
        "output_ring{0, 1}",
        "output_ring{0, 0}",
    ),
    Fault(
        "lanes that miss a phase",
        TILE,
        "if (thread_index() % 32 == 0) mbarrier_wait(barrier, parity); sync_warp();",
        "mbarrier_wait(barrier, parity);",
    ),
    # Waits.
    Fault(
        "no wait for keys",
        FORWARD,
        "mbarrier_wait(layout.keys_full(key_ring.stage), key_ring.parity);",
        "",
        2,
    ),
    Fault(
        "no wait for values",
        FORWARD,
        "mbarrier_wait(layout.values_full(value_ring.stage), value_ring.parity); wgmma_fence();",
        "wgmma_fence();",
    ),
    Fault(
        "no wait for queries",
        FORWARD,
        "mbarrier_wait(layout.queries_full(), query_parity);",
        "",
    ),
    Fault(
        "no wait for the tile's number",
        FORWARD,
        "mbarrier_wait(layout.taken_full(slot), taken >> 1 & 1);",
        "",
    ),
    Fault(
        "scores read early",
        FORWARD,
        "wgmma_wait<1>();",
        "wgmma_wait<2>();",
    ),
    Fault(
        "first scores read early",
        FORWARD,
        "wgmma_wait<0>(); pin(S); finish_keys",
        "pin(S); finish_keys",
    ),
    Fault(
        "outputs read early",
        FORWARD,
        "wgmma_wait<0>(); pin(O); pin(S); release(layout.values_empty(value_ring.stage));",
        "pin(O); pin(S); release(layout.values_empty(value_ring.stage));",
    ),
    Fault(
        "no wait for dO",
        GRADIENTS,
        "if (i + 1 < tile.steps) mbarrier_wait(layout.outputs_full",
        "if (false) mbarrier_wait(layout.outputs_full",
    ),
    Fault(
        "dQ read early",
        GRADIENTS,
        "wgmma_wait<1>(); pin(dQ);",
        "pin(dQ);",
    ),
    Fault(
        "dP read early",
        GRADIENTS,
        "wgmma_wait<1>(); pin(dP);",
        "wgmma_wait<2>(); pin(dP);",
    ),
    Fault(
        "half of the bytes expected",
        FORWARD,
        "mbarrier_arrive_expect(full, Layout::kKeyBytes);",
        "mbarrier_arrive_expect(full, Layout::kKeyBytes / 2);",
        2,
    ),
    Fault(
        "reduction not waited for",
        BACKWARD,
        "bulk_wait_read<0>();",
        "",
    ),
    Fault(
        "turn given before the sums are there",
        BACKWARD,
        "bulk_wait<0>();",
        "bulk_wait_read<0>();",
    ),
    Fault(
        "turn not waited for",
        BACKWARD,
        "wait_until_equal",
        "if (false) wait_until_equal",
    ),
    # Fences.
    Fault(
        "no fence after the barriers' init",
        FORWARD,
        "fence_mbarrier_init();",
        "",
    ),
    Fault(
        "no fence before the last values",
        FORWARD,
        "pin(O); pin(P); wgmma_fence(); start_outputs();",
        "start_outputs();",
    ),
    Fault(
        "no fence of cleared values",
        FORWARD,
        "clear_row<kKeys, Config::kWidth>(to, row); fence_proxy_async_shared();",
        "clear_row<kKeys, Config::kWidth>(to, row);",
    ),
    Fault(
        "no fence of dS",
        GRADIENTS,
        "fence_proxy_async_shared(); wgmma_wait<1>();",
        "wgmma_wait<1>();",
    ),
    Fault(
        "no fence of dQ",
        SCORES,
        "fence_proxy_async_shared(); named_barrier_arrive",
        "named_barrier_arrive",
    ),
    Fault(
        "no fence of cleared keys",
        BACKWARD,
        "fence_proxy_async_shared(); sync_warp();",
        "sync_warp();",
    ),
    # Buffers given back early, or not at all.
    Fault(
        "values given back early",
        FORWARD,
        "wgmma_wait<0>(); pin(O); pin(S); release(layout.values_empty(value_ring.stage));",
        "release(layout.values_empty(value_ring.stage)); wgmma_wait<0>(); pin(O); pin(S);",
    ),
    Fault(
        "queries given back early",
        FORWARD,
        "round_weights(); int i = 1;",
        "round_weights(); release(layout.queries_empty()); int i = 1;",
    ),
    Fault(
        "queries not given back",
        FORWARD,
        "release(layout.queries_empty());",
        "",
    ),
    Fault(
        "queries of this step given back",
        GRADIENTS,
        "release(layout.queries_empty(before))",
        "release(layout.queries_empty(query_ring.stage))",
    ),
    Fault(
        "dO given back early",
        GRADIENTS,
        "wgmma_wait<1>(); scores.release(layout.outputs_empty(output_ring.stage)); named_barrier_sync",
        "scores.release(layout.outputs_empty(output_ring.stage)); wgmma_wait<1>(); named_barrier_sync",
    ),
    Fault(
        "one buffer for dS",
        GRADIENTS,
        "i & 1",
        "0",
        7,
    ),
    Fault(
        "dQ's buffer not waited for",
        SCORES,
        "if (used_before) named_barrier_sync",
        "if (false) named_barrier_sync",
    ),
    # Barriers' counts.
    Fault(
        "arrivals of a barrier",
        FORWARD,
        "4 * Config::kWarpgroups; // that",
        "4 * Config::kWarpgroups - 1; // that",
    ),
    Fault(
        "threads of a turn",
        FORWARD,
        "named_barrier_sync(1 + warpgroup, kThreadsOfTwo)",
        "named_barrier_sync(1 + warpgroup, 128)",
    ),
    Fault(
        "whose turn it is",
        FORWARD,
        "(warpgroup + 1) % Config",
        "(warpgroup + 2) % Config",
    ),
    Fault(
        "halves of dS not waited for",
        GRADIENTS,
        "named_barrier_sync(kScoresReady, kBothWarpgroups); start_query_gradient(i & 1); start_key",
        "start_query_gradient(i & 1); start_key",
    ),
    Fault(
        "more registers than there are",
        FORWARD,
        "allocate_registers<Config::kConsumerRegisters>",
        "allocate_registers<248>",
    ),
    # Masks and tiles of keys.
    Fault(
        "right bound",
        FORWARD,
        "position[r] + p.mask.right + 1",
        "position[r] + p.mask.right",
    ),
    Fault(
        "left bound",
        FORWARD,
        "hidden |= c < start &&",
        "hidden |= c <= start &&",
    ),
    Fault(
        "sinks",
        FORWARD,
        "&& c >= sinks",
        "",
    ),
    Fault(
        "columns of a thread",
        FORWARD,
        "column = 2 * (thread_index() % 4)",
        "column = thread_index() % 4",
    ),
    Fault(
        "first tile taken for visible",
        VISIBILITY,
        "clamped(lowest + v.right + 1, 0, s.nk) / size",
        "(clamped(lowest + v.right + 1, 0, s.nk) / size + 1)",
    ),
    Fault(
        "tile of sinks left out",
        VISIBILITY,
        "(smaller(v.sinks, s.nk) + size - 1) / size",
        "smaller(v.sinks, s.nk) / size",
    ),
    Fault(
        "tiles of queries of sinks",
        VISIBILITY,
        "if (!is_sink_tile(v, n, keys))",
        "if (true)",
    ),
    Fault(
        "turns of sinks",
        VISIBILITY,
        "return larger(end - first, 0) + sinks - 1 - n;",
        "return larger(end - first, 0) + sinks - n;",
    ),
    Fault(
        "columns of log-sums",
        SCORES,
        "stage * (Layout::kQueryTerms * Layout::kTermBytes) + 4 * column",
        "stage * (Layout::kQueryTerms * Layout::kTermBytes)",
    ),
    Fault(
        "left bound of the backward",
        SCORES,
        "key(r) - first + p.mask.left;",
        "key(r) - first + p.mask.left - 1;",
    ),
    Fault(
        "hidden values left as they are",
        FORWARD,
        "clear_row<kKeys, Config::kWidth>(to, row);",
        ";",
    ),
    Fault(
        "hidden keys left as they are",
        BACKWARD,
        "clear_row<kKeys, kWidth>(to, row);",
        ";",
    ),
    # Arithmetic.
    Fault(
        "sums that do not shrink",
        FORWARD,
        "fmaf(sum[r], shrink[r], part[0] + part[1])",
        "sum[r] + part[0] + part[1]",
    ),
    Fault(
        "sums of one lane",
        FORWARD,
        "sum[r] += from_lane_xor(sum[r], 2);",
        "",
    ),
    Fault(
        "swizzle of dS",
        SCORES,
        "((lane >> 4) ^ (lane & 7)) << 4",
        "(lane >> 4) << 4",
    ),
    Fault(
        "rows of dS",
        SCORES,
        "first + 16 * warp + lane % 16",
        "first + 16 * warp + lane % 8",
    ),
    # Heads so wide that the warpgroups of the backward share their keys.
    Fault(
        "weights not waited for",
        GRADIENTS,
        "named_barrier_sync(kWeightsReady, kBothWarpgroups);",
        "",
        width=256,
    ),
    Fault(
        "one buffer for weights and dS",
        GRADIENTS,
        "i & 1",
        "0",
        7,
        width=256,
    ),
    Fault(
        "rows of weights",
        GRADIENTS,
        "scores.warp * 16 * kRowBytes",
        "scores.warp * 8 * kRowBytes",
        width=256,
    ),
    Fault(
        "shared dS not waited for",
        GRADIENTS,
        "named_barrier_sync(kScoresReady, kBothWarpgroups); start_query_gradient(i & 1); wgmma",
        "start_query_gradient(i & 1); wgmma",
        width=256,
    ),
    Fault(
        "no fence of shared dS",
        GRADIENTS,
        "fence_proxy_async_shared(); mbarrier_wait",
        "mbarrier_wait",
        width=256,
    ),
    Fault(
        "no wait for the only dO",
        GRADIENTS,
        "mbarrier_wait(layout.outputs_full(output_ring.stage), output_ring.parity); start_gradient",
        "start_gradient",
        width=256,
    ),
    Fault(
        "rows of a gradient given back early",
        GRADIENTS,
        "wgmma_wait<1>(); scores.release(OfValues",
        "scores.release(OfValues",
        width=256,
    ),
    Fault(
        "wide dQ read early",
        GRADIENTS,
        "wgmma_wait<0>(); pin(dQ);",
        "wgmma_wait<1>(); pin(dQ);",
        width=256,
    ),
    Fault(
        "second block of dQ not waited for",
        GRADIENTS,
        "give_query_gradient<1>(dQ, kWarpgroup, true)",
        "give_query_gradient<1>(dQ, kWarpgroup, false)",
        width=256,
    ),
    Fault(
        "columns of the second warpgroup",
        GRADIENTS,
        "kFirstBlock * kKeys",
        "0 * kKeys",
        width=256,
    ),
    Fault(
        "blocks of dQ that the writer knows of",
        BACKWARD,
        "if (++block == blocks)",
        "if (true)",
        width=256,
    ),
)

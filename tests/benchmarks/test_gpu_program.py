"""Counting launches in the text of a compiled program."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from benchmarks.speed import gpu_program

PROGRAM = """HloModule jit_round, entry_computation_layout={()->f32[]}

%fused_add (p: f32[2]) -> f32[2] {
  %p = f32[2]{0} parameter(0)
  ROOT %sum = f32[2]{0} add(%p, %p)
}

%short_body (s: (s32[], f32[2])) -> (s32[], f32[2]) {
  %s = (s32[], f32[2]{0}) parameter(0)
  %f = f32[2]{0} fusion(%s), kind=kLoop, calls=%fused_add
  ROOT %t = (s32[], f32[2]{0}) tuple(%s, %f)
}

%branch (b: f32[2]) -> f32[2] {
  %b = f32[2]{0} parameter(0)
  ROOT %copied = f32[2]{0} copy(%b)
}

%step (s: (s32[], f32[2])) -> (s32[], f32[2]) {
  %s = (s32[], f32[2]{0}) parameter(0)
  %g = f32[2]{0} get-tuple-element(%s), index=1
  %m = (f32[2]{0}, s8[64]{0}) custom-call(%g, %g), custom_call_target="__cublas$lt$matmul"
  %f = f32[2]{0} fusion(%m), kind=kLoop, calls=%fused_add, metadata={op_name="add(x)"}
  ROOT %t = (s32[], f32[2]{0}) tuple(%s, %f)
}

%turn (s: (s32[], f32[2])) -> (s32[], f32[2]) {
  %s = (s32[], f32[2]{0}) parameter(0)
  %w = (s32[], f32[2]{0}) while(%s), condition=%more, body=%step
  %c = f32[2]{0} conditional(%w, %w, %w), branch_computations={%branch, %branch}
  %k = (s32[], f32[2]{0}) while(%s), condition=%few, body=%short_body, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %t = (s32[], f32[2]{0}) tuple(%s, %c)
}

ENTRY %main (a: f32[2]) -> f32[2] {
  %a = f32[2]{0} parameter(0)
  %z = f32[2]{0} copy(%a)
  %w = (s32[], f32[2]{0}) while(%z), condition=%more, body=%turn
  %v = (f32[2]{0}, s32[]) custom-call(%z), custom_call_target="cusolver_gesvdj_ffi"
  ROOT %r = f32[2]{0} get-tuple-element(%w), index=1
}
"""


def test_steps_turns_and_the_rest_are_counted_apart():
    counts = gpu_program.count(PROGRAM)
    assert counts.step == 2  # a product and a fusion; tuples launch nothing
    assert counts.turn == 1 + (1 + 2) + (1 + 5)  # the loop of steps; the branches; a loop of five turns
    assert counts.outside == 3
    assert counts.calls == {"__cublas$lt$matmul": 1, "cusolver_gesvdj_ffi": 1}


def test_the_step_is_the_innermost_loop_however_deep():
    again = PROGRAM.replace("ENTRY %main", "%outer").replace("body=%turn", "body=%turn") + (
        "\nENTRY %main (a: f32[2]) -> f32[2] {\n  %w = (f32[2]{0}) while(%a), condition=%more, body=%outer\n}\n"
    )
    assert gpu_program.count(again)[:3] == (2, 10, 1 + 3)


def test_a_program_without_such_loops_is_refused():
    text = jax.jit(lambda x: lax.fori_loop(0, 3, lambda _, y: jnp.sin(y), x)).lower(1.0).compile().as_text()
    with pytest.raises(ValueError, match="expected a loop within a loop"):
        gpu_program.count(text)


def test_a_compiled_program_can_be_read():
    def turn(state):
        return state[0] - 1, lax.fori_loop(0, state[0], lambda _, y: jnp.sort(y), state[1])

    program = jax.jit(lambda n, x: lax.while_loop(lambda state: state[0] > 0, turn, (n, x))).lower(3, jnp.ones(8))
    counts = gpu_program.count(program.compile().as_text())
    assert min(counts[:3]) > 0

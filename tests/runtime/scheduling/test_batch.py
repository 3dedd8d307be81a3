from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from te_runtime.prediction import Prediction
from te_runtime.row_parts import pick_parts
from te_runtime.scheduling.batch import InputLayout, PackedRows, pack_rows, take_answers
from te_runtime.scheduling.request import Request

MakeRequest = Callable[..., Request]
INPUTS = (InputLayout("x", np.dtype(np.float32)), InputLayout("ids", np.dtype(np.int64)))

wanted = st.lists(
    st.tuples(
        st.integers(1, 4),
        st.lists(st.sampled_from("abcde"), min_size=1, max_size=5, unique=True).map(tuple),
    ),
    min_size=1,
    max_size=12,
)
shapes = st.sampled_from([((3,), ()), ((2, 2), (5,)), ((1,), (1, 2))])


def fill(
    make_request: MakeRequest, wanted: Any, shapes: Any
) -> tuple[list[Request], dict[Request, list[Any]]]:
    """Requests whose rows are all different, and their arrays."""
    requests, arrays, row = [], {}, 0
    for rows, tasks in wanted:
        own = []
        for layout, shape in zip(INPUTS, shapes, strict=True):
            size = int(np.prod(shape))
            values = 1000 * np.arange(row, row + rows)[:, None] + np.arange(size)[None]
            own.append(values.astype(layout.dtype).reshape(rows, *shape))
        request = make_request(
            rows=rows,
            tasks=tasks,
            data=tuple(array.tobytes() for array in own),
            row_shapes=shapes,
            is_single=len(tasks) == 1,
        )
        requests.append(request)
        arrays[request] = own
        row += rows
    return requests, arrays


def answer(task: str, x: Any, ids: Any, *, gated: bool) -> Prediction:
    """What a model would say: a function of each row and the task."""
    rows = len(x)
    keys = x.reshape(rows, -1)[:, :1] + ids.reshape(rows, -1)[:, :1]
    output = (keys + ord(task)).astype(np.float32)
    return Prediction(output, (2 * output).repeat(2, axis=1) if gated else None, "cpu")


def run(packed: PackedRows, *, gated: bool) -> list[Prediction]:
    """As an executor that computes everything for every row."""
    every = {
        part.task: answer(part.task, packed.feeds["x"], packed.feeds["ids"], gated=gated)
        for part in packed.parts
    }
    return pick_parts(every, packed.parts)


@settings(deadline=None, max_examples=80)
@given(wanted=wanted, shapes=shapes, gated=st.booleans())
def test_everyone_gets_the_answers_to_their_own_rows(
    make_request: MakeRequest, wanted: Any, shapes: Any, gated: bool
) -> None:
    requests, arrays = fill(make_request, wanted, shapes)
    packed = pack_rows(requests, INPUTS)
    found = take_answers(packed, run(packed, gated=gated))
    assert set(packed.requests) == set(requests)
    assert len(found) == len(packed.requests) == len(requests)
    for request, result in zip(packed.requests, found, strict=True):
        by_task = {request.tasks[0]: result} if request.is_single else result
        assert tuple(by_task) == request.tasks
        for task, prediction in by_task.items():
            expected = answer(task, *arrays[request], gated=gated)
            np.testing.assert_array_equal(prediction.output, expected.output, strict=True)
            assert prediction.provider == "cpu"
            if gated:
                np.testing.assert_array_equal(
                    prediction.routing_weights, expected.routing_weights, strict=True
                )
            else:
                assert prediction.routing_weights is None


@settings(deadline=None, max_examples=80)
@given(wanted=wanted, shapes=shapes)
def test_rows_stand_side_by_side_and_each_task_has_its_own(
    make_request: MakeRequest, wanted: Any, shapes: Any
) -> None:
    requests, arrays = fill(make_request, wanted, shapes)
    packed = pack_rows(requests, INPUTS)
    assert packed.rows == sum(rows for rows, _ in wanted)
    for number, layout in enumerate(INPUTS):
        expected = np.concatenate([arrays[request][number] for request in packed.requests])
        np.testing.assert_array_equal(packed.feeds[layout.name], expected, strict=True)
        assert packed.feeds[layout.name].flags.c_contiguous
    owner = [request for request in packed.requests for _ in range(request.rows)]
    assert len({part.task for part in packed.parts}) == len(packed.parts)
    assert {part.task for part in packed.parts} == {task for request in requests for task in request.tasks}
    for part in packed.parts:
        every = np.arange(packed.rows)
        rows = every if part.rows is None else every[part.rows]
        assert list(rows) == [row for row, request in enumerate(owner) if part.task in request.tasks]
        assert part.size == len(rows)


def test_requests_for_one_task_each_need_no_copy(make_request: MakeRequest) -> None:
    """Each task's rows are one slice, whatever the order they came in."""
    wanted = [(1, ("b",)), (2, ("a",)), (1, ("b",)), (3, ("c",)), (1, ("a",))]
    requests, _ = fill(make_request, wanted, ((3,), ()))
    parts = {part.task: part.rows for part in pack_rows(requests, INPUTS).parts}
    assert parts == {"a": slice(0, 3), "b": slice(3, 5), "c": slice(5, 8)}


def test_a_task_of_all_rows_has_no_part_picked(make_request: MakeRequest) -> None:
    requests, _ = fill(make_request, [(2, ("a", "b")), (1, ("a",))], ((3,), ()))
    parts = {part.task: part.rows for part in pack_rows(requests, INPUTS).parts}
    assert parts["a"] is None


def test_answers_of_one_batch_share_memory_and_the_feeds_cannot_be_written(make_request: MakeRequest) -> None:
    requests, _ = fill(make_request, [(2, ("a",)), (1, ("a",))], ((3,), ()))
    packed = pack_rows(requests, INPUTS)
    answers = run(packed, gated=True)
    found = take_answers(packed, answers)
    assert all(np.shares_memory(one.output, answers[0].output) for one in found)
    assert not any(array.flags.writeable for array in packed.feeds.values())

"""Paths of B whose turns, components and likeness are known."""

import numpy as np
import pytest

from demur.em.dynamics import (
    comp,
    comp_along,
    flat,
    local_cosines,
    principal_path,
    read_dynamics,
    turning_point,
)
from demur.errors import ConfigError, DegenerateVectorError, ModelLoadError, TooFewPromptsError


def corner(n, angle, d=6, seed=0):
    """A path that runs straight for `n` steps, turns by `angle`, and runs on for `n` steps."""
    rng = np.random.default_rng(seed)
    x, y = np.linalg.qr(rng.normal(size=(d, d)))[0][:2]
    there = np.arange(n + 1)[:, None] * x
    away = np.arange(1, n + 1)[:, None] * (np.cos(angle) * x + np.sin(angle) * y)
    return np.concatenate([there, there[-1] + away])


def test_a_straight_path_has_cosine_minus_one():
    found = local_cosines(corner(10, 0.0), k=3)
    assert np.isnan(found[:3]).all()
    assert np.isnan(found[-3:]).all()
    np.testing.assert_allclose(found[3:-3], -1, atol=1e-12)


@pytest.mark.parametrize("angle", [np.pi / 6, np.pi / 2, 2.0])
def test_a_turn_shows_at_its_step_and_by_its_angle(angle):
    found = local_cosines(corner(10, angle), k=4)
    assert turning_point(found) == 10
    np.testing.assert_allclose(found[10], -np.cos(angle), atol=1e-12)
    np.testing.assert_allclose(found[[5, 6, 14, 15]], -1, atol=1e-12)


def test_where_a_path_rests_no_angle_is_made_up():
    path = np.concatenate([corner(6, np.pi / 2), np.tile(corner(6, np.pi / 2)[-1], (8, 1))])
    found = local_cosines(path, k=2)
    assert np.isnan(found[12:]).all()
    rng = np.random.default_rng(0)
    shaky = path + 1e-6 * rng.normal(size=path.shape)
    assert turning_point(local_cosines(shaky, k=2)) > 12
    assert turning_point(local_cosines(shaky, k=2, least=0.1)) == 6
    assert turning_point(np.full(5, np.nan)) is None


def test_a_path_that_is_too_short_is_refused():
    with pytest.raises(TooFewPromptsError):
        local_cosines(corner(2, 0.0), k=3)
    with pytest.raises(ConfigError):
        local_cosines(corner(2, 0.0), k=0)


def test_a_path_in_a_plane_has_two_components():
    path = corner(10, np.pi / 2)
    found = principal_path(path)
    np.testing.assert_allclose(found.shares.sum(), 1, atol=1e-12)
    assert found.shares[0] > found.shares[1] > 0
    rebuilt = found.scores @ found.components + path.mean(0)
    np.testing.assert_allclose(rebuilt, path, atol=1e-12)
    np.testing.assert_allclose(found.components @ found.components.T, np.eye(2), atol=1e-12)
    assert found.scores[-1, 0] > found.scores[0, 0]
    # The corner stands out on the second component.
    assert np.abs(found.scores[:, 1]).argmax() in (0, 10, 20)


def test_components_of_a_path_that_does_not_move():
    with pytest.raises(DegenerateVectorError):
        principal_path(np.ones((5, 3)))
    with pytest.raises(TooFewPromptsError):
        principal_path(np.eye(3)[:2])


def test_comp_is_one_for_parallel_and_zero_for_orthogonal():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    v = basis[:, :1]
    np.testing.assert_allclose(comp(v * [[2.0, -1.0]], v * 3), 1)
    np.testing.assert_allclose(comp(basis[:, :2], basis[:, 3:6]), 0, atol=1e-12)
    # Two orthonormal columns against themselves: ||I|| / 2.
    np.testing.assert_allclose(comp(basis[:, :2], basis[:, :2]), 2**0.5 / 2)
    turned = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    a, b = rng.normal(size=(8, 3)), rng.normal(size=(8, 4))
    np.testing.assert_allclose(comp(turned @ a, turned @ b), comp(a, b))
    with pytest.raises(DegenerateVectorError):
        comp(np.zeros((3, 1)), v[:3])


def test_comp_along_ends_where_it_ends():
    rng = np.random.default_rng(0)
    ends = rng.normal(size=(3, 5))
    grow = np.linspace(0, 1, 6)
    paths = [grow[:, None, None] * end[None, :, None] for end in ends]
    found = comp_along(paths)
    assert np.isnan(found[0])
    np.testing.assert_allclose(found[1:], found[-1])
    centred = ends.T - ends.T.mean(1, keepdims=True)
    np.testing.assert_allclose(found[-1], comp(centred, centred))
    # What all adapters have in common does not count.
    common = rng.normal(size=(6, 5, 1))
    shifted = [path + common for path in paths]
    np.testing.assert_allclose(comp_along(shifted)[1:], found[1:])
    with pytest.raises(TooFewPromptsError):
        comp_along(paths[:1])
    with pytest.raises(ConfigError):
        comp_along([paths[0], paths[1][:-1]])


def test_flat_keeps_steps_and_values():
    path = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    assert flat(path).shape == (2, 6)
    assert flat(path).dtype == np.float64
    assert flat(path)[1].tolist() == [6, 7, 8, 9, 10, 11]


def test_a_folder_without_a_record(tmp_path):
    with pytest.raises(ModelLoadError, match=r"dynamics\.safetensors"):
        read_dynamics(tmp_path)
    (tmp_path / "dynamics.safetensors").write_bytes(b"nothing")
    with pytest.raises(ModelLoadError, match="damaged"):
        read_dynamics(tmp_path)

"""OFMU's mathematics against hand-derived values, autograd and the theory's rate."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ofmu_ray.algorithm import similarity_gradient
from ofmu_ray.algorithm.curvature import Exact, FiniteDifference
from ofmu_ray.config import OptimizerConfig
from ofmu_ray.engines import TorchEngine
from ofmu_ray.errors import UserError
from ofmu_ray.methods.ofmu import OFMU, OFMUConfig

SGD = {"name": "sgd", "clip": None}


class Quadratics(torch.nn.Module):
    """Two quadratic losses 1/2 x'Ax + a'x of one vector x."""

    def __init__(self, x: np.ndarray):
        super().__init__()
        self.x = torch.nn.Parameter(torch.tensor(x, dtype=torch.float64))


def quadratic(module: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    matrix, linear = batch
    return 0.5 * module.x @ matrix @ module.x + linear @ module.x


class HandDerived:
    """Phi = L_f - beta cos(g_f, g_r) for quadratics in numpy: first and second derivatives by the chain rule."""

    def __init__(self, seed: int = 0, n: int = 7):
        rng = np.random.default_rng(seed)
        self.A, self.B = (m + m.T for m in rng.normal(size=(2, n, n)))
        self.a, self.b, self.x = rng.normal(size=(3, n))

    def gradients(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.A @ x + self.a, self.B @ x + self.b

    def grad_phi(self, x: np.ndarray, beta: float) -> np.ndarray:
        f, r = self.gradients(x)
        _, u, w = self.sim(f, r)
        return f - beta * (self.A @ u + self.B @ w)

    @staticmethod
    def sim(f: np.ndarray, r: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        nf, nr = np.linalg.norm(f), np.linalg.norm(r)
        c = f @ r / (nf * nr)
        return c, (r / nr - c * f / nf) / nf, (f / nf - c * r / nr) / nr

    def hess_phi_times(self, x: np.ndarray, v: np.ndarray, beta: float) -> np.ndarray:
        f, r = self.gradients(x)
        df, dr = self.A @ v, self.B @ v
        du, dw = self.sim_second(f, r, df, dr), self.sim_second(r, f, dr, df)
        return self.A @ v - beta * (self.A @ du + self.B @ dw)

    def sim_second(self, f: np.ndarray, r: np.ndarray, df: np.ndarray, dr: np.ndarray) -> np.ndarray:
        """d of u = r/(|f||r|) - c f/|f|^2 when f, r move by df, dr."""
        c, u, w = self.sim(f, r)
        ff, rr = f @ f, r @ r
        alpha = 1 / math.sqrt(ff * rr)
        dalpha = -alpha * (f @ df / ff + r @ dr / rr)
        dc = u @ df + w @ dr
        return dalpha * r + alpha * dr - dc * f / ff - c * df / ff + 2 * c * f * (f @ df) / ff**2

    def batches(self) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
        t = [torch.tensor(m) for m in (self.A, self.a, self.B, self.b)]
        return (t[0], t[1]), (t[2], t[3])

    def engine(self, inner_lr: float = 1.0, outer_lr: float = 1.0) -> TorchEngine:
        return TorchEngine(
            Quadratics(self.x),
            quadratic,
            inner=OptimizerConfig(lr=inner_lr, **SGD),
            outer=OptimizerConfig(lr=outer_lr, **SGD),
        )


def relative(value: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(value - expected) / np.linalg.norm(expected))


def test_similarity_gradient_of_tensors_and_lists():
    hand = HandDerived()
    f, r = hand.gradients(hand.x)
    c, u, w = hand.sim(f, r)
    cosine, tu, tw = similarity_gradient(torch.tensor(f), torch.tensor(r))
    assert float(cosine) == pytest.approx(c, abs=1e-12)
    np.testing.assert_allclose(tu.numpy(), u, atol=1e-12)
    np.testing.assert_allclose(tw.numpy(), w, atol=1e-12)
    split = lambda g: [torch.tensor(g[:3]), torch.tensor(g[3:]).reshape(2, 2)]  # noqa: E731
    _, lu, _ = similarity_gradient(split(f), split(r))
    np.testing.assert_allclose(torch.cat([t.reshape(-1) for t in lu]).numpy(), u, atol=1e-12)


def test_similarity_gradient_against_autograd_and_of_zero():
    f = torch.randn(9, dtype=torch.float64, requires_grad=True)
    r = torch.randn(9, dtype=torch.float64, requires_grad=True)
    squared = torch.nn.functional.cosine_similarity(f, r, dim=0) ** 2
    gf, gr = torch.autograd.grad(squared, (f, r))
    _, u, w = similarity_gradient(f.detach(), r.detach(), "squared_cosine")
    torch.testing.assert_close(u, gf)
    torch.testing.assert_close(w, gr)
    cosine, u, w = similarity_gradient(torch.zeros(9), r.detach().float())
    assert (float(cosine), float(u.norm()), float(w.norm())) == (0.0, 0.0, 0.0)


def test_exact_round_equals_the_hand_derived_step():
    """One inner ascent step and one outer step with 2 rho (Hess Phi)(grad Phi), in float64."""
    hand, beta, rho, eta_in, eta_out = HandDerived(), 0.7, 0.3, 0.05, 0.04
    engine = hand.engine(eta_in, eta_out)
    forget, retain = hand.batches()
    config = OFMUConfig.from_preset("full", beta=beta, inner_steps=1, rho=rho, curvature="exact")
    metrics = OFMU(config).round(engine, [forget], [retain])

    x = hand.x + eta_in * hand.grad_phi(hand.x, beta)
    phi = hand.grad_phi(x, beta)
    _, g_r = hand.gradients(x)
    x = x - eta_out * (g_r + 2 * rho * hand.hess_phi_times(x, phi, beta))
    np.testing.assert_allclose(engine.module.x.detach().numpy(), x, atol=1e-10)
    assert metrics["phi_gradient_norm"] == pytest.approx(np.linalg.norm(phi), abs=1e-10)


@pytest.mark.parametrize(("difference", "order"), [("forward", 1), ("central", 2)])
def test_finite_differences_have_the_predicted_error(difference, order):
    """grad Phi of quadratics is exact up to rounding; Hess Phi v errs by O(h) forward and O(h^2) central."""
    hand, beta = HandDerived(), 0.7
    forget, retain = hand.batches()
    errors = []
    for step in (2e-2, 1e-2):
        engine = hand.engine()
        fd = FiniteDifference(engine, difference, step)
        g_f, _ = engine.gradient(forget, kind="forget")
        v = torch.randn(7, dtype=torch.float64)
        hv = fd.hessian_vector(forget, "forget", g_f, [v], float(v.norm()))
        assert relative(hv[0].numpy(), hand.A @ v.numpy()) < 1e-10  # a quadratic's gradient is linear

        def phi():
            return [torch.tensor(hand.grad_phi(engine.module.x.detach().numpy(), beta))]  # noqa: B023

        base = phi()
        curved = fd.phi_hessian_vector(phi, base, float(base[0].norm()), (forget, retain), beta)
        errors.append(relative(curved[0].numpy(), hand.hess_phi_times(hand.x, base[0].numpy(), beta)))
    assert errors[0] < 0.2
    assert errors[1] == pytest.approx(errors[0] / 2**order, rel=0.25)


def small_network(widths: list[int], seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    layers: list[torch.nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [torch.nn.Linear(a, b), torch.nn.Tanh()]
    return torch.nn.Sequential(*layers[:-1]).double()


def regression(module, batch):
    x, y = batch
    return ((module(x) - y) ** 2).mean()


@settings(max_examples=25)
@given(
    seed=st.integers(0, 10_000),
    width=st.integers(2, 6),
    depth=st.integers(1, 2),
    beta=st.floats(0.05, 2.0),
    similarity=st.sampled_from(["cosine", "squared_cosine"]),
)
def test_gradient_of_phi_on_random_networks(seed, width, depth, beta, similarity):
    """Exact and central differences against autograd of Phi as written in the paper."""
    module = small_network([3, *[width] * depth, 2], seed)
    batch = lambda: (torch.randn(5, 3).double(), torch.randn(5, 2).double())  # noqa: E731
    forget, retain = batch(), batch()
    parameters = list(module.parameters())
    g_f = torch.autograd.grad(regression(module, forget), parameters, create_graph=True)
    g_r = torch.autograd.grad(regression(module, retain), parameters, create_graph=True)
    flat_f, flat_r = (torch.cat([g.reshape(-1) for g in gs]) for gs in (g_f, g_r))
    cosine = torch.nn.functional.cosine_similarity(flat_f, flat_r, dim=0)
    phi = regression(module, forget) - beta * (cosine if similarity == "cosine" else cosine**2)
    expected = torch.cat([g.reshape(-1) for g in torch.autograd.grad(phi, parameters)])
    start = torch.cat([p.detach().reshape(-1) for p in parameters])

    for options, tolerance in (
        ({"curvature": "exact"}, 1e-9),
        ({"difference": "central", "relative_step": 1e-5}, 1e-5),
    ):
        engine = TorchEngine(
            module, regression, inner=OptimizerConfig(lr=1.0, **SGD), outer=OptimizerConfig(lr=1e-30, **SGD)
        )
        state = engine.state_dict()
        config = OFMUConfig.from_preset("full", beta=beta, inner_steps=1, rho=0.0, similarity=similarity, **options)
        OFMU(config).round(engine, [forget], [retain])
        moved = torch.cat([p.detach().reshape(-1) for p in module.parameters()]) - start
        scale = float(expected.norm() + flat_f.detach().norm())
        assert float((moved - expected).norm()) < tolerance * scale + 1e-12
        engine.load_state_dict(state)


@pytest.mark.parametrize(
    ("preset", "options", "forget", "retain"),
    [
        ("full", {}, 14, 14),
        ("lite", {}, 7, 3),
        ("full", {"difference": "central"}, 24, 24),
        ("lite", {"beta": 0.0, "rho": 0.0}, 5, 1),
        ("lite", {"reuse_forget_gradient": False}, 8, 3),
        ("full", {"penalty_curvature": "none", "outer_steps": 3}, 10, 13),
        ("full", {"penalty_curvature": "none", "reuse_retain_gradient": True}, 10, 3),
    ],
)
def test_passes_and_updates_per_round(preset, options, forget, retain):
    """The cost table of docs/method.md, by the engine's pass counts; batches drawn as batches_per_round says."""
    module = small_network([3, 4, 2], 0)
    engine = TorchEngine(module, regression)
    method = OFMU(OFMUConfig.from_preset(preset, inner_steps=5, **{"relative_step": 1e-3, **options}))
    streams = {
        name: iter([(torch.randn(5, 3).double(), torch.randn(5, 2).double()) for _ in range(count)])
        for name, count in method.batches_per_round().items()
    }
    method.round(engine, streams["forget"], streams["retain"])
    assert engine.account.gradient_passes == {"forget": forget, "retain": retain}
    assert engine.account.updates == 5 + options.get("outer_steps", 1)
    assert [next(stream, None) for stream in streams.values()] == [None, None]


def test_penalty_schedule_and_state():
    method = OFMU(OFMUConfig(rho=0.5, rho_growth=2.0))
    engine = TorchEngine(small_network([3, 4, 2], 0), regression)
    batch = (torch.randn(5, 3).double(), torch.randn(5, 2).double())
    rhos = [method.round(engine, [batch], [batch])["rho"] for _ in range(3)]
    assert rhos == [0.5, 1.0, 2.0]
    resumed = OFMU(method.config)
    resumed.load_state_dict(method.state_dict())
    assert resumed.rho == 4.0


def test_streams_that_run_out_are_named():
    engine = TorchEngine(small_network([3, 4, 2], 0), regression)
    batch = (torch.randn(5, 3).double(), torch.randn(5, 2).double())
    with pytest.raises(UserError, match="forget batches ran out"):
        OFMU().round(engine, iter([batch]), [batch])
    with pytest.raises(UserError, match="forget batches is empty"):
        OFMU().round(engine, [], [batch])


def test_decorrelation_lowers_the_similarity_along_the_ascent():
    """With a large beta the inner loop moves towards orthogonal gradients; without it the cosine does not change."""
    cosines = {}
    for beta in (0.0, 50.0):
        module = small_network([3, 6, 2], 1)
        torch.manual_seed(3)
        x = torch.randn(8, 3).double()
        forget, retain = (x, torch.randn(8, 2).double()), (x + 0.1, torch.randn(8, 2).double())
        inner = OptimizerConfig(name="sgd", lr=1e-3, clip=1.0)
        engine = TorchEngine(module, regression, inner=inner, outer=OptimizerConfig(lr=1e-30, **SGD))
        method = OFMU(OFMUConfig.from_preset("full", beta=beta, rho=0.0, inner_steps=10, curvature="exact"))
        for _ in range(5):
            method.round(engine, [forget], [retain])
        g = [engine.gradient(b)[0] for b in (forget, retain)]
        cosines[beta] = float(similarity_gradient(g[0][0], g[1][0])[0])
    assert cosines[50.0] < cosines[0.0] - 0.05


def test_exact_penalty_against_autograd_of_the_outer_objective():
    """(Hess Phi)(grad Phi) by triple backward is half the gradient of |grad Phi|^2 from autograd."""
    module = small_network([3, 4, 2], 5)
    forget, retain = ((torch.randn(5, 3).double(), torch.randn(5, 2).double()) for _ in range(2))
    engine, beta = TorchEngine(module, regression), 0.4
    parameters = list(module.parameters())
    g_f = torch.autograd.grad(regression(module, forget), parameters, create_graph=True)
    g_r = torch.autograd.grad(regression(module, retain), parameters, create_graph=True)
    cosine = torch.nn.functional.cosine_similarity(
        *(torch.cat([g.reshape(-1) for g in gs]) for gs in (g_f, g_r)), dim=0
    )
    phi = regression(module, forget) - beta * cosine
    grad_phi = torch.autograd.grad(phi, parameters, create_graph=True)
    expected = torch.autograd.grad(sum((g**2).sum() for g in grad_phi), parameters)
    v = engine.as_vector([g.detach() for g in grad_phi])
    product = Exact(engine, "cosine").phi_hessian_vector(list, v, 1.0, (forget, retain), beta)
    for a, b in zip(engine.as_tensors(product), expected, strict=True):
        torch.testing.assert_close(2 * a.reshape(b.shape), b)


class Concave(torch.nn.Module):
    """A bi-level problem within the theory's assumptions: L_f concave and smooth, flat in some directions."""

    def __init__(self, x: torch.Tensor):
        super().__init__()
        self.x = torch.nn.Parameter(x.clone())


@pytest.mark.slow
def test_residual_falls_no_slower_than_the_claimed_rate():
    """min_k of the residual |grad Phi|^2 + |P grad L_r|^2 is at most C (1/K + K/T^2), with one C for all K and T.

    Phi = L_f = -|A(x - p)|^2/2 has the plane {A x = A p} as its set of maximisers; on that plane L_r, smooth and
    convex (not strongly), picks the solution. P projects on the plane, so the residual is 0 exactly at a solution.
    beta = 0 keeps Phi concave; the penalty term is the paper's, by exact curvature.
    """
    torch.manual_seed(0)
    n, rank = 6, 3
    A = torch.linalg.qr(torch.randn(n, n).double())[0][:rank] * torch.tensor([[0.3], [0.6], [1.0]]).double()
    p, q, start = torch.randn(3, n).double()
    onto_plane = torch.eye(n).double() - torch.linalg.pinv(A) @ A

    def loss(module, kind):
        if kind == "forget":
            return -0.5 * ((A @ (module.x - p)) ** 2).sum()
        return (1 + (module.x - q) ** 2).sqrt().sum()

    def residual(module):
        x = module.x.detach()
        slope = (x - q) / (1 + (x - q) ** 2).sqrt()
        return float(((A.T @ A @ (x - p)) ** 2).sum() + ((onto_plane @ slope) ** 2).sum())

    best = {}
    for K, T in itertools.product((8, 32, 128), (4, 8, 16, 32)):
        module = Concave(start)
        inner, outer = OptimizerConfig(lr=0.5, **SGD), OptimizerConfig(lr=0.05, **SGD)
        engine = TorchEngine(module, loss, inner=inner, outer=outer)
        config = OFMUConfig.from_preset("full", beta=0.0, rho=0.1, rho_growth=1.01, inner_steps=T, curvature="exact")
        method, residuals = OFMU(config), [residual(module)]
        for _ in range(K):
            method.round(engine, ["forget"], ["retain"])
            residuals.append(residual(module))
        best[K, T] = min(residuals)
    constants = {(K, T): value / (1 / K + K / T**2) for (K, T), value in best.items()}
    assert max(constants.values()) <= max(constants[8, T] for T in (4, 8, 16, 32)) * 1.01, constants
    assert best[128, 32] < best[8, 32] / 16, best  # and it does fall with K if T is large

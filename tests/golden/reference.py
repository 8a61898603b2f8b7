"""The kit's truth: backbone, adapters, side path, loss and AdamW in float64, one row at a time.

So no padding exists. Written from the formulas (README: the side path, the adapters); imports
nothing of this repository. Gradients are autograd's. Where the code is clever this file is plain:
effective weights are materialised, sums over u <= t are products with a triangle of ones, decoding
and greedy search run the whole row again for every token.

Shapes: T tokens of one row, D hidden size, H heads, K key/value heads, Dh head size, M slots,
        r memory width, V vocabulary.
`p` is a dict of float64 tensors by the names of the files: Hugging Face's for the backbone, PEFT's
for the adapter, and `model.layers.N.side_path.NAME`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Config = dict[str, Any]  # of config.json, of an AdapterConfig, of a TalanConfig
PEFT = "base_model.model."


# ---------------------------------------------------------------------------------------- backbone


def rms(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last axis."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def frequencies(config: Config) -> Tensor:
    """Rotary frequencies (Dh/2,); Llama 3 stretches long wavelengths and blends those between."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta, size = rope.get("rope_theta") or config["rope_theta"], config["head_dim"]
    freq = float(theta) ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    if rope.get("rope_type", "default") == "default":
        return freq
    low, high, factor = (rope[k] for k in ("low_freq_factor", "high_freq_factor", "factor"))
    turns = rope["original_max_position_embeddings"] * freq / (2 * math.pi)
    smooth = (turns - low) / (high - low)
    blended = (1 - smooth) * freq / factor + smooth * freq
    stretched = torch.where(turns < low, freq / factor, blended)
    return torch.where(turns > high, freq, stretched)


def rotate(x: Tensor, freq: Tensor) -> Tensor:
    """Rotary embedding of x (T,Dh): first half + i second half, times exp(i position frequency)."""
    a, b = x.chunk(2, -1)
    angle = torch.arange(len(x), dtype=torch.float64)[:, None] * freq
    turned = torch.complex(a, b) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((turned.real, turned.imag), -1)


def effective_weight(p: Tensors, name: str, adapter: Config | None) -> Tensor:
    """(out,in): W, W + s B A, or DoRA's m (W + s B A) / ||W + s B A||_row, its norm detached."""
    weight, key = p[name + ".weight"], PEFT + name
    if adapter is None or key + ".lora_A.weight" not in p:
        return weight
    root = math.sqrt(adapter["rank"])
    scale = adapter["alpha"] / (root if adapter["kind"] == "rslora" else adapter["rank"])
    weight = weight + scale * p[key + ".lora_B.weight"] @ p[key + ".lora_A.weight"]
    if adapter["kind"] == "dora":
        unit = weight / weight.norm(dim=1, keepdim=True).detach()
        weight = p[key + ".lora_magnitude_vector"][:, None] * unit
    return weight


def attention(p: Tensors, config: Config, name: str, x: Tensor, adapter: Config | None) -> Tensor:
    """Causal attention over x (T,D), head by head; query head h reads key/value head h // (H/K)."""
    T, size, freq = len(x), config["head_dim"], frequencies(config)
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    weights = (effective_weight(p, f"{name}.{part}_proj", adapter) for part in "qkv")
    q, k, v = ((x @ weight.T).view(T, -1, size) for weight in weights)
    if config["model_type"] == "qwen3":
        q = rms(q, config["rms_norm_eps"]) * p[f"{name}.q_norm.weight"]
        k = rms(k, config["rms_norm_eps"]) * p[f"{name}.k_norm.weight"]
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    out = []
    for h in range(heads):
        g = h // (heads // groups)
        score = rotate(q[:, h], freq) @ rotate(k[:, g], freq).T / math.sqrt(size)
        out.append(score.masked_fill(future, -math.inf).softmax(-1) @ v[:, g])
    return torch.cat(out, -1) @ effective_weight(p, f"{name}.o_proj", adapter).T


def mlp(p: Tensors, name: str, x: Tensor, adapter: Config | None) -> Tensor:
    """down(silu(gate x) * up x) of x (T,D)."""
    names = (f"{name}.{part}_proj" for part in ("gate", "up", "down"))
    gate, up, down = (effective_weight(p, each, adapter) for each in names)
    return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


def forward(
    p: Tensors, config: Config, ids: list[int], adapter: Any = None, side: Any = None
) -> tuple[Tensors, Tensors]:
    """One row -> embedding, layer.N, hidden (T,D), logits (T,V); its num.N (M,r), den.N (M)."""
    h = p["model.embed_tokens.weight"][torch.tensor(ids)]
    eps, inner, states = config["rms_norm_eps"], {"embedding": h}, {}

    def write(h: Tensor, n: int, site: str) -> Tensor:
        if not side or n not in side["layers"] or side["site"] != site:
            return h
        weights = {key: p[f"model.layers.{n}.side_path.{key}"] for key in side_names(side)}
        out = side_path(weights, side, h)
        states.update({f"num.{n}": out["num"], f"den.{n}": out["den"]})
        return out["h_out"]

    for n in range(config["num_hidden_layers"]):
        name = f"model.layers.{n}"
        x = rms(h, eps) * p[f"{name}.input_layernorm.weight"]
        h = write(h + attention(p, config, f"{name}.self_attn", x, adapter), n, "attention")
        x = rms(h, eps) * p[f"{name}.post_attention_layernorm.weight"]
        h = write(h + mlp(p, f"{name}.mlp", x, adapter), n, "block")
        inner[f"layer.{n}"] = h
    inner["hidden"] = rms(h, eps) * p["model.norm.weight"]
    head = p["model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"]
    return inner | {"logits": inner["hidden"] @ head.T}, states


# --------------------------------------------------------------------------------------- side path


def side_names(side: Config) -> list[str]:
    """Names of the side path's parameters under these settings."""
    query = "w_query" if side["mixer"] == "attention" else "w_read"
    names = ["slots", "w_key", "w_value", query, "w_out"]
    if side["mixer"] == "mlp":
        names += ["slot_mlp_in", "slot_mlp_out", "channel_mlp_in", "channel_mlp_out"]
    if side["writeback"] == "gate":
        names += ["w_gate", "b_gate"]
    return names


def scale_grad(x: Tensor, g: float) -> Tensor:
    """x, its gradient times g."""
    return g * x + (1 - g) * x.detach()


def side_path(w: Tensors, side: Config, h: Tensor, num: Any = 0, den: Any = 0) -> Tensors:
    """h (T,D), sums so far -> every intermediate, h_out (T,D), sums num (M,r), den (M) after it."""
    stream = scale_grad(h, side["trunk_grad_scale"])
    x, root = rms(stream), math.sqrt(side["width"])
    k, v = rms(x @ w["w_key"].T), x @ w["w_value"].T
    e = k @ rms(w["slots"]).T / root
    past = torch.ones(len(h), len(h), dtype=h.dtype).tril()  # 1 where u <= t
    nums = torch.einsum("tu,um,ur->tmr", past, e.exp(), v) + num
    dens = torch.einsum("tu,um->tm", past, e.exp()) + den
    z = nums / dens[:, :, None]
    y = remix(w, side["mixer"], x, z)
    delta = write_back(w, side, stream, x, y)
    h = h + scale_grad(delta, side["grad_scale"])
    inner = {"x": x, "k": k, "v": v, "e": e, "z": z, "y": y, "delta": delta}
    return inner | {"h_out": h, "num": nums[-1], "den": dens[-1]}


def remix(w: Tensors, mixer: str, x: Tensor, z: Tensor) -> Tensor:
    """Memory z (T,M,r) and tokens x (T,D) -> y (T,r)."""
    silu = torch.nn.functional.silu
    if mixer == "mlp":
        inner = silu(torch.einsum("jn,tnr->tjr", w["slot_mlp_in"], z))
        z = z + torch.einsum("mj,tjr->tmr", w["slot_mlp_out"], inner)
        inner = silu(torch.einsum("jd,tmd->tmj", w["channel_mlp_in"], z))
        z = z + torch.einsum("cj,tmj->tmc", w["channel_mlp_out"], inner)
    if mixer == "attention":
        score = torch.einsum("tr,tmr->tm", rms(x @ w["w_query"].T), rms(z)) / math.sqrt(z.shape[-1])
    else:
        score = x @ w["w_read"].T
    return torch.einsum("tm,tmr->tr", score.softmax(-1), z)


def write_back(w: Tensors, side: Config, stream: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """y (T,r) -> delta (T,D)."""
    d = y @ w["w_out"].T
    if side["writeback"] == "gate":
        return torch.sigmoid(x @ w["w_gate"] + w["b_gate"])[:, None] * d
    if side["writeback"] == "bounded":
        longest = side["bound"] * stream.norm(dim=-1)
        return d * (longest / d.norm(dim=-1)).clamp(max=1)[:, None]
    return d


# ---------------------------------------------------------------------------------------- training


def trainable(names: list[str], scope: str) -> list[str]:
    """Which of these parameters learn under the scope."""
    groups = {"joint": ("adapter", "side"), "talan": ("side",), "writeback": ("adapter",)}[scope]
    writing = ("w_out", "w_gate", "b_gate") if scope == "writeback" else ()
    found = []
    for name in names:
        kind = "adapter" if name.startswith(PEFT) else "backbone"
        kind = "side" if ".side_path." in name else kind
        if kind in groups or name.rsplit(".", 1)[-1] in writing:
            found.append(name)
    return found


def loss(p: Tensors, config: Config, rows: Any, adapter: Config, side: Config) -> Tensor:
    """Mean cross-entropy of all supervised tokens of rows [(ids, supervised)], first ones apart."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for ids, supervised in rows:
        log_p = forward(p, config, ids, adapter, side)[0]["logits"].log_softmax(-1)
        for t in range(1, len(ids)):
            if supervised[t]:
                total, count = total - log_p[t - 1, ids[t]], count + 1
    return total / count


def adamw(start: Tensor, grads: list[Tensor], lr: float, settings: Config) -> Tensor:
    """Where AdamW with decoupled weight decay takes a parameter after these gradients."""
    (b1, b2), p, m, v = settings["betas"], start, torch.zeros_like(start), torch.zeros_like(start)
    for t, g in enumerate(grads, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        step = (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + settings["eps"])
        p = p - lr * settings["weight_decay"] * p - lr * step
    return p


def train(
    p: Tensors, names: list[str], settings: Config, loss_of: Any
) -> tuple[Tensor, dict[str, list[Tensor]], Tensors]:
    """AdamW on one batch: first loss, every step's gradients, parameters after the last step."""
    rate = {name: settings["lr"] for name in names}
    for name in names:
        rate[name] *= settings["talan_lr_scale"] if ".side_path." in name else 1
    now, losses = dict(p), []
    grads: dict[str, list[Tensor]] = {name: [] for name in names}
    for _ in range(settings["steps"]):
        leaves = {name: now[name].detach().requires_grad_() for name in names}
        losses.append(loss_of({**now, **leaves}))
        for name, g in zip(names, torch.autograd.grad(losses[-1], list(leaves.values()))):
            grads[name].append(g)
            now[name] = adamw(p[name], grads[name], rate[name], settings)
    return losses[0].detach(), grads, {name: now[name] for name in names}


def greedy(
    p: Tensors, config: Config, prompt: list[int], limit: int, stop: Any, adapter: Any, side: Any
) -> tuple[list[int], float]:
    """The likeliest tokens up to and with a stop id; the least lead of a logit over the next."""
    out: list[int] = []
    lead = math.inf
    while len(out) < limit and not (out and out[-1] in stop):
        logits = forward(p, config, prompt + out, adapter, side)[0]["logits"][-1]
        best = logits.topk(2)
        out.append(int(best.indices[0]))
        lead = min(lead, float(best.values[0] - best.values[1]))
    return out, lead

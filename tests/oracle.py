"""The slow, plain truth: float64 numpy, written from the equations in the README ("The side path") alone.

No torch, no cumulative sums, no batched products: one loop for each index of the equation.
Every weight is an array named as in SidePath; `w` is a dict {name: array}.
"""
import numpy as np

EPS = 1e-6


# ------------------------------------------------------------------------------------------ small parts
def dot(a, b):
    """a . b = sum_i a_i b_i"""
    total = 0.0
    for i in range(len(a)):
        total += float(a[i]) * float(b[i])
    return total


def matvec(matrix, x):
    """(W x)_o = sum_i W_oi x_i"""
    return np.array([dot(matrix[o], x) for o in range(len(matrix))], dtype=np.float64)


def rms(x):
    """rms(x) = x / sqrt(mean(x^2) + 1e-6)"""
    return np.asarray(x, dtype=np.float64) / np.sqrt(dot(x, x) / len(x) + EPS)


def norm(x):
    """||x|| = sqrt(sum_i x_i^2)"""
    return np.sqrt(dot(x, x))


def sigmoid(a):
    """sigmoid(a) = 1 / (1 + exp(-a)), written so that neither side overflows"""
    return 1.0 / (1.0 + np.exp(-a)) if a >= 0 else np.exp(a) / (1.0 + np.exp(a))


def silu(a):
    """silu(a) = a sigmoid(a)"""
    return a * sigmoid(a)


def softmax(scores):
    """softmax(s)_m = exp(s_m) / sum_n exp(s_n)"""
    top = max(scores)
    weights = [np.exp(s - top) for s in scores]
    return np.array([x / sum(weights) for x in weights])


# ------------------------------------------------------------------------------------------ the side path
def key_value(w, x):
    """k_t = rms(w_key x_t),  v_t = w_value x_t"""
    return rms(matvec(w["w_key"], x)), matvec(w["w_value"], x)


def energies(w, k):
    """e_tm = k_t . rms(slots_m) / sqrt(r)"""
    r = len(k)
    return np.array([dot(k, rms(w["slots"][m])) / np.sqrt(r) for m in range(len(w["slots"]))])


def slot_mlp(w, z):
    """z_mc <- z_mc + sum_j slot_mlp_out_mj silu(sum_n slot_mlp_in_jn z_nc), for each channel c by itself"""
    out = np.zeros_like(z)
    for c in range(z.shape[1]):
        hidden = [silu(a) for a in matvec(w["slot_mlp_in"], z[:, c])]
        out[:, c] = z[:, c] + matvec(w["slot_mlp_out"], hidden)
    return out


def channel_mlp(w, z):
    """z_mc <- z_mc + sum_j channel_mlp_out_cj silu(sum_d channel_mlp_in_jd z_md), for each slot m by itself"""
    out = np.zeros_like(z)
    for m in range(z.shape[0]):
        hidden = [silu(a) for a in matvec(w["channel_mlp_in"], z[m])]
        out[m] = z[m] + matvec(w["channel_mlp_out"], hidden)
    return out


def remix(w, mixer, x, z):
    """linear:    a = softmax(w_read x),                                      y = sum_m a_m z_m
    mlp:       z <- channel_mlp(slot_mlp(z)), then as linear
    attention: a_m = softmax_m(rms(w_query x) . rms(z_m) / sqrt(r)),       y = sum_m a_m z_m
    returns (y, a, z)"""
    slots, r = z.shape
    if mixer == "mlp":
        z = channel_mlp(w, slot_mlp(w, z))
    if mixer in ("linear", "mlp"):
        a = softmax(matvec(w["w_read"], x))
    elif mixer == "attention":
        q = rms(matvec(w["w_query"], x))
        a = softmax([dot(q, rms(z[m])) / np.sqrt(r) for m in range(slots)])
    else:
        raise ValueError(mixer)
    y = np.zeros(r)
    for m in range(slots):
        for c in range(r):
            y[c] += a[m] * z[m, c]
    return y, a, z


def write_back(w, writeback, bound, h, x, y):
    """d = w_out y
    add: d      gate: sigmoid(w_gate . x + b_gate) d      bounded: d min(1, bound ||h|| / ||d||)"""
    d = matvec(w["w_out"], y)
    if writeback == "add":
        return d
    if writeback == "gate":
        return sigmoid(dot(w["w_gate"], x) + float(np.asarray(w["b_gate"]).reshape(()))) * d
    if writeback == "bounded":
        length = norm(d)
        return d if length == 0.0 else d * min(1.0, bound * norm(h) / length)
    raise ValueError(writeback)


def side_path(w, h, mixer, writeback, bound=0.1, state=None, lengths=None, h_read=None):
    """h'_t = h_t + Delta_t,  x_t = rms(h_t),  num_tm = sum_{u<=t} exp(e_um) v_u,  den_tm = sum_{u<=t} exp(e_um),  z_tm = num_tm / den_tm

    h (B,T,D); state = (num (B,M,r), den (B,M)) of the tokens before; lengths (B) real tokens: u never runs over a pad.
    `h_read` is what the side path reads where that differs from the stream it writes to (the derivative with trunk_grad_scale).
    Returns (h', (num, den), inner); at pads h' is nan (undefined). inner holds k, v, e, z, a, y, delta by name."""
    h = np.asarray(h, dtype=np.float64)
    read = h if h_read is None else np.asarray(h_read, dtype=np.float64)
    batch, tokens, _ = h.shape
    slots, r = w["slots"].shape
    num = np.zeros((batch, slots, r)) if state is None else np.array(state[0], dtype=np.float64)
    den = np.zeros((batch, slots)) if state is None else np.array(state[1], dtype=np.float64)
    out = np.full(h.shape, np.nan)
    inner = {n: np.full((batch, tokens) + s, np.nan) for n, s in dict(
        k=(r,), v=(r,), e=(slots,), z=(slots, r), a=(slots,), y=(r,), delta=(h.shape[2],)).items()}
    for b in range(batch):
        for t in range(tokens if lengths is None else int(lengths[b])):
            x = rms(read[b, t])
            k, v = key_value(w, x)
            e = energies(w, k)
            for m in range(slots):
                den[b, m] += np.exp(e[m])
                for c in range(r):
                    num[b, m, c] += np.exp(e[m]) * v[c]
            z = np.array([[num[b, m, c] / den[b, m] for c in range(r)] for m in range(slots)])
            y, a, _ = remix(w, mixer, x, z)
            delta = write_back(w, writeback, bound, read[b, t], x, y)
            for i in range(h.shape[2]):
                out[b, t, i] = h[b, t, i] + delta[i]
            for name, value in dict(k=k, v=v, e=e, z=z, a=a, y=y, delta=delta).items():
                inner[name][b, t] = value
    return out, (num, den), inner


# ------------------------------------------------------------------------------------------ adapters
def lora_linear(weight, a, b, x, alpha, rank, rslora=False, mask=None, bias=None):
    """y = W x + s B (A d(x)),  s = alpha / rank (LoRA) or alpha / sqrt(rank) (rsLoRA);  d(x) = mask * x, mask already divided by 1-p"""
    s = alpha / np.sqrt(rank) if rslora else alpha / rank
    x = np.asarray(x, dtype=np.float64)
    dropped = x if mask is None else x * mask
    y = np.zeros((len(x), len(weight)))
    for n in range(len(x)):
        base, low = matvec(weight, x[n]), matvec(b, matvec(a, dropped[n]))
        for o in range(len(weight)):
            y[n, o] = base[o] + s * low[o] + (0.0 if bias is None else bias[o])
    return y


def merged_rows(weight, a, b, s):
    """(W + s B A)_oi = W_oi + s sum_k B_ok A_ki, row by row"""
    rows = np.zeros(np.shape(weight))
    for o in range(rows.shape[0]):
        for i in range(rows.shape[1]):
            rows[o, i] = weight[o, i] + s * dot(b[o], a[:, i])
    return rows


def dora_gain(weight, a, b, magnitude, s):
    """g_o = m_o / ||W + s B A||_o ;  a row whose norm is 0 has g_o = 1 (trap 8)"""
    rows = merged_rows(weight, a, b, s)
    return np.array([1.0 if norm(rows[o]) == 0.0 else magnitude[o] / norm(rows[o]) for o in range(len(rows))])


def dora_linear(weight, a, b, magnitude, x, alpha, rank, mask=None, gain=None):
    """y = W x + (g - 1) W d(x) + g s B A d(x)   (trap 9; without dropout: g (W x + s B A x)),  s = alpha / rank

    `gain` fixes g, for the derivative: the norm is detached from the graph."""
    s = alpha / rank
    g = dora_gain(weight, a, b, magnitude, s) if gain is None else gain
    x = np.asarray(x, dtype=np.float64)
    dropped = x if mask is None else x * mask
    y = np.zeros((len(x), len(weight)))
    for n in range(len(x)):
        full, part, low = matvec(weight, x[n]), matvec(weight, dropped[n]), matvec(b, matvec(a, dropped[n]))
        for o in range(len(weight)):
            y[n, o] = full[o] + (g[o] - 1.0) * part[o] + g[o] * s * low[o]
    return y


def central_difference(f, array, index, step=1e-5):
    """df/dx_index = (f(x + step) - f(x - step)) / (2 step), f reads `array`, which is put back as it was"""
    kept = array[index]
    array[index] = kept + step
    high = f()
    array[index] = kept - step
    low = f()
    array[index] = kept
    return (high - low) / (2.0 * step)

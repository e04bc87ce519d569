// One token of each row through Mamba2's mixer between its projections, in float32 on a CPU: for decoding.
// As causal_conv1d_step, mamba2_step and the gated norm, in this order (decay_scan/README.md). A row's numbers do not depend on
// how many rows there are, nor on threads.
#include <math.h>
#include <string.h>

typedef struct {
    long rows, heads, head_dim, groups, state, norm_groups, width;
    double epsilon;
    void *parallel; // none: a token is too little
    const float *projected, *taps, *conv_bias, *A_log, *D, *dt_bias, *norm_weight; // taps [C, W], the last meets the token itself
    const float *window, *entering;                                                // [B, W - 1, C] oldest first, [B, H, P, N]
    float *next_window, *leaving, *convolved, *out;                                // convolved [C]: scratch
} Step;

long given_size(void) { return sizeof(Step); }

static float silu(float x) { return x / (1.f + expf(-x)); }

static void convolve(const Step *s, long b, const float *in, long C) {
    long W = s->width;
    const float *window = s->window + b * (W - 1) * C;
    float *next = s->next_window + b * (W - 1) * C;
    for (long c = 0; c < C; c++) {
        float sum = s->conv_bias ? s->conv_bias[c] : 0.f;
        for (long w = 0; w < W - 1; w++) sum += s->taps[c * W + w] * window[w * C + c];
        s->convolved[c] = silu(sum + s->taps[c * W + W - 1] * in[c]);
    }
    if (W > 2) memcpy(next, window + C, sizeof(float) * (W - 2) * C);
    memcpy(next + (W - 2) * C, in, sizeof(float) * C);
}

static void advance(const Step *s, long b, const float *dt, float *out) {
    long H = s->heads, P = s->head_dim, N = s->state, G = s->groups;
    for (long h = 0; h < H; h++) {
        float v = dt[h] + s->dt_bias[h], d = v > 20.f ? v : log1pf(expf(v)), a = expf(-expf(s->A_log[h]) * d);
        const float *B = s->convolved + H * P + h / (H / G) * N, *C = B + G * N;
        for (long p = 0; p < P; p++) {
            long at = ((b * H + h) * P + p) * N;
            const float *old = s->entering + at;
            float *now = s->leaving + at, x = s->convolved[h * P + p], u = d * x, sum = 0;
#pragma GCC ivdep
            for (long n = 0; n < N; n++) {
                float next = a * old[n] + u * B[n];
                now[n] = next;
                sum += next * C[n];
            }
            out[h * P + p] = sum + s->D[h] * x;
        }
    }
}

static void normalize(const Step *s, const float *z, float *out) {
    long I = s->heads * s->head_dim, S = I / s->norm_groups;
    for (long g = 0; g < s->norm_groups; g++, out += S, z += S) {
        const float *w = s->norm_weight + g * S;
        float sum = 0;
        for (long i = 0; i < S; i++) {
            out[i] *= silu(z[i]);
            sum += out[i] * out[i];
        }
        float r = 1.f / sqrtf(sum / S + (float)s->epsilon);
        for (long i = 0; i < S; i++) out[i] *= r * w[i];
    }
}

void step_forward(const Step *s) {
    long I = s->heads * s->head_dim, C = I + 2 * s->groups * s->state;
    for (long b = 0; b < s->rows; b++) {
        const float *row = s->projected + b * (I + C + s->heads);
        convolve(s, b, row + I, C);
        advance(s, b, row + I + C, s->out + b * I);
        normalize(s, row, s->out + b * I);
    }
}

// 0 if this processor runs what the compiler made.
int mix_check(void) {
    float taps[8] = {0}, bias[4] = {1, 1, 1, 1}, one[4] = {1, 1, 1, 1}, in[6] = {1}, window[4] = {0}, state[1] = {2}, out[1], next[4], now[1], c[4];
    Step s = {1, 1, 1, 1, 1, 1, 2, 1e-5, 0, in, taps, bias, one, one, one, one, window, state, next, now, c, out};
    step_forward(&s);
    return !(fabsf(out[0]) < 2.f && now[0] > 0.f && next[0] == 0.f);
}

// Mamba2's mixer between its projections in float32 on a CPU: convolution and SiLU, chunked scan, gated norm, both ways.
// Sources: op.py says what is computed, decay_scan/README.md how a scan goes by chunks. No library is needed.
//
// Names: B rows of T tokens, X numbers each in `projected`: z [I], then C channels x [H P], B [G N], C [G N], then dt [H].
// Work is cut into jobs by the shape of the tensors, never by threads, and sums over jobs are taken in their order: bits are
// the same for any number of threads. P and N are multiples of 16.
#include <math.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#define WIDE 4 // vectors a row of a tile
#elif defined(__AVX__)
#define LANES 8
#define WIDE 2
#else
#define LANES 4
#define WIDE 4
#endif
#define TALL 6 // rows of a tile
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float vec4 __attribute__((vector_size(16), aligned(4), may_alias));
#define INLINE static inline __attribute__((always_inline))
#define Q 64      // tokens a chunk of the scan
#define BLOCK 128 // tokens a job of the convolution and of the norm
#if defined(__clang__)
#define APART _Pragma("clang loop vectorize(assume_safety)") // the loop's arrays do not overlap
#else
#define APART _Pragma("GCC ivdep")
#endif
#define LOG2E 1.4426950408889634f

typedef struct {
    long rows, tokens, heads, head_dim, groups, state, norm_groups, parts, threads, scratch_size;
    double epsilon;
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned); // GOMP_parallel of the OpenMP that PyTorch runs on, or none
    const float *projected, *taps, *conv_bias, *A_log, *D, *dt_bias, *norm_weight; // taps [4, C]: the last meets the token itself
    const int *starts;                                                              // [B, T] first token of each one's document, or none
    float *convolved, *y, *states, *gates, *reciprocal, *out; // states [B, chunks, H, N, P] that enter; gates [2, B, H, T], with Q numbers after them
    const float *d_out;
    float *d_projected, *d_convolved, *d_y, *d_shared;    // d_shared [parts - 1, B, T, 2 G N]: what other parts add to B and C
    float *d_taps, *d_heads, *d_norm;                     // [5, C] with the bias last, [3, H] of A_log, dt_bias, D, [I]
    float *taps_by_job, *heads_by_row, *norm_by_job;      // their addends
    float *scratch;                                       // [threads, scratch_size]
    const float *window, *entering; // before the first token, or none: inputs [B, 3, C] oldest first, states [B, H, N, P]
    float *leaving;                 // [B, H, N, P] states after the last token, or none
} Mix;

long given_size(void) { return sizeof(Mix); }

// ---- work over threads ----

typedef void (*Job)(const Mix *, long, float *);
typedef struct { const Mix *mix; Job run; long jobs, next, workers; } Work;

static void work(void *given) {
    Work *w = given;
    float *scratch = w->mix->scratch + w->mix->scratch_size * __atomic_fetch_add(&w->workers, 1, __ATOMIC_RELAXED);
    for (long job; (job = __atomic_fetch_add(&w->next, 1, __ATOMIC_RELAXED)) < w->jobs;) w->run(w->mix, job, scratch);
}

static void each(const Mix *m, Job run, long jobs) {
    Work w = {m, run, jobs, 0, 0};
    long threads = jobs < m->threads ? jobs : m->threads;
    if (threads > 1 && m->parallel) m->parallel(work, &w, (unsigned)threads, 0);
    else work(&w);
}

static void add_in_order(const float *from, long addends, long n, float *sum) {
    memset(sum, 0, sizeof(float) * n);
    for (long a = 0; a < addends; a++)
        APART
        for (long i = 0; i < n; i++) sum[i] += from[a * n + i];
}

// ---- arithmetic ----

INLINE float exp2_(float x) { // relative error 2e-7; 0 below -126; NaN stays NaN
    float c = x < -126.f ? -126.f : (x > 126.f ? 126.f : x), r = __builtin_rintf(c), f = c - r;
    float p = 1.535336188319500e-4f;
    p = p * f + 1.339887440266574e-3f;
    p = p * f + 9.618437357674640e-3f;
    p = p * f + 5.550332471162809e-2f;
    p = p * f + 2.402264791363012e-1f;
    p = p * f + 6.931472028550421e-1f;
    p = p * f + 1.f;
    union { int i; float f; } u = {.i = (int)((unsigned)((int)r + 127) << 23)};
    return x < -126.f ? 0.f : p * u.f;
}
INLINE float sigmoid_(float x) { return 1.f / (1.f + exp2_(-LOG2E * x)); }

// C [R, NV vectors] = A B, or C += A B; A's element (r, k) lies at A[r ar + k ak]
INLINE void tile(const int R, const int NV, long K, const float *A, long ar, long ak, const float *B, long ldb, float *C, long ldc, int add) {
    vec c[TALL][WIDE];
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) c[r][v] = add ? *(const vec *)(C + r * ldc + LANES * v) : (vec){0};
    for (long k = 0; k < K; k++) {
        vec b[WIDE];
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) b[v] = *(const vec *)(B + k * ldb + LANES * v);
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) {
            float a = A[r * ar + k * ak];
#pragma GCC unroll 4
            for (int v = 0; v < NV; v++) c[r][v] += a * b[v];
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) *(vec *)(C + r * ldc + LANES * v) = c[r][v];
}

// C [M, N] = A B or += A B with N a multiple of 16
#define ROWS(NV) \
    for (; m + TALL <= M; m += TALL) tile(TALL, NV, K, A + m * ar, ar, ak, B + n, ldb, C + m * ldc + n, ldc, add); \
    for (; m + 2 <= M; m += 2) tile(2, NV, K, A + m * ar, ar, ak, B + n, ldb, C + m * ldc + n, ldc, add); \
    if (m < M) tile(1, NV, K, A + m * ar, ar, ak, B + n, ldb, C + m * ldc + n, ldc, add);
static void product(long M, long N, long K, const float *A, long ar, long ak, const float *B, long ldb, float *C, long ldc, int add) {
    for (long n = 0; n < N;) {
        long m = 0;
        if (N - n >= WIDE * LANES) {
            ROWS(WIDE)
            n += WIDE * LANES;
        } else {
            ROWS(1)
            n += LANES;
        }
    }
}

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
typedef int int4 __attribute__((vector_size(16)));
#define SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, (int4){i, j, k, l})
#endif

static void transpose(long M, long N, const float *A, long lda, float *B, long ldb) { // B [N, M] = A [M, N]^T, multiples of 4
    for (long i = 0; i < M; i += 4)
        for (long j = 0; j < N; j += 4) {
            const float *a = A + i * lda + j;
            float *b = B + j * ldb + i;
            vec4 r0 = *(const vec4 *)a, r1 = *(const vec4 *)(a + lda), r2 = *(const vec4 *)(a + 2 * lda), r3 = *(const vec4 *)(a + 3 * lda);
            vec4 s0 = SHUFFLE(r0, r1, 0, 4, 1, 5), s1 = SHUFFLE(r0, r1, 2, 6, 3, 7), s2 = SHUFFLE(r2, r3, 0, 4, 1, 5), s3 = SHUFFLE(r2, r3, 2, 6, 3, 7);
            *(vec4 *)b = SHUFFLE(s0, s2, 0, 1, 4, 5);
            *(vec4 *)(b + ldb) = SHUFFLE(s0, s2, 2, 3, 6, 7);
            *(vec4 *)(b + 2 * ldb) = SHUFFLE(s1, s3, 0, 1, 4, 5);
            *(vec4 *)(b + 3 * ldb) = SHUFFLE(s1, s3, 2, 3, 6, 7);
        }
}

static void transpose_chunk(long q, long N, const float *A, long lda, float *B) { // B [N, Q] = A [q, N]^T, zeros beyond q
    if (q == Q) { transpose(Q, N, A, lda, B, Q); return; }
    for (long n = 0; n < N; n++)
        for (long j = 0; j < Q; j++) B[n * Q + j] = j < q ? A[j * lda + n] : 0.f;
}

// ---- sizes ----

INLINE long inner_(const Mix *m) { return m->heads * m->head_dim; }
INLINE long channels_(const Mix *m) { return inner_(m) + 2 * m->groups * m->state; }
INLINE long width_(const Mix *m) { return inner_(m) + channels_(m) + m->heads; }
INLINE long blocks_(const Mix *m) { return (m->tokens + BLOCK - 1) / BLOCK; }

// ---- convolution and SiLU ----

// The inputs that meet a token's taps: x[s] is s tokens back; those before its document are the token itself, times 0.
INLINE int reach(const Mix *m, long b, long t, const float *x[4], float k[4]) {
    long bt = b * m->tokens + t, first = m->starts ? m->starts[bt] : 0;
    int n = t - first >= 3 ? 4 : (int)(t - first + 1);
    const float *own = m->projected + bt * width_(m) + inner_(m);
    for (int s = 0; s < 4; s++) {
        x[s] = s < n ? own - s * width_(m) : (m->window ? m->window + (b * 3 + 3 + t - s) * channels_(m) : own);
        k[s] = s < n || m->window;
    }
    return n;
}

static void convolve(const Mix *m, long job, float *scratch) {
    long C = channels_(m), b = job / blocks_(m), t0 = job % blocks_(m) * BLOCK, t1 = t0 + BLOCK < m->tokens ? t0 + BLOCK : m->tokens;
    (void)scratch;
    for (long t = t0; t < t1; t++) {
        const float *x[4], *w = m->taps, *bias = m->conv_bias;
        float k[4], *o = m->convolved + (b * m->tokens + t) * C;
        int n = reach(m, b, t, x, k);
        const float *x0 = x[0], *x1 = x[1], *x2 = x[2], *x3 = x[3];
        if (n == 4)
            APART
            for (long c = 0; c < C; c++) {
                float s = bias[c] + w[3 * C + c] * x0[c] + w[2 * C + c] * x1[c] + w[C + c] * x2[c] + w[c] * x3[c];
                o[c] = s * sigmoid_(s);
            }
        else
            APART
            for (long c = 0; c < C; c++) {
                float s = bias[c] + w[3 * C + c] * x0[c] + k[1] * w[2 * C + c] * x1[c] + k[2] * w[C + c] * x2[c] + k[3] * w[c] * x3[c];
                o[c] = s * sigmoid_(s);
            }
    }
}

static void convolve_back(const Mix *m, long job, float *d) { // d: scratch [C]
    long C = channels_(m), X = width_(m), T = m->tokens, b = job / blocks_(m), t0 = job % blocks_(m) * BLOCK;
    long t1 = t0 + BLOCK < T ? t0 + BLOCK : T, tail = t1 + 3 < T ? t1 + 3 : T;
    const float *w = m->taps, *bias = m->conv_bias;
    float *p = m->taps_by_job + job * 5 * C;
    memset(p, 0, sizeof(float) * 5 * C);
    for (long t = t0; t < tail; t++) { // the tokens after the block read its last ones
        const float *x[4], *g = m->d_convolved + (b * T + t) * C;
        float k[4], *o = m->d_projected + (b * T + t) * X + inner_(m);
        int n = reach(m, b, t, x, k);
        const float *x0 = x[0], *x1 = x[1], *x2 = x[2], *x3 = x[3];
        float k1 = k[1], k2 = k[2], k3 = k[3];
        if (t >= t1 && t - n + 1 >= t1) continue;
        APART
        for (long c = 0; c < C; c++) {
            float s = bias[c] + w[3 * C + c] * x0[c] + k1 * w[2 * C + c] * x1[c] + k2 * w[C + c] * x2[c] + k3 * w[c] * x3[c];
            float q = sigmoid_(s);
            d[c] = g[c] * q * (1.f + s * (1.f - q));
        }
        if (t < t1)
            APART
            for (long c = 0; c < C; c++) {
                float e = d[c];
                o[c] = w[3 * C + c] * e;
                p[3 * C + c] += e * x0[c];
                p[2 * C + c] += k1 * e * x1[c];
                p[C + c] += k2 * e * x2[c];
                p[c] += k3 * e * x3[c];
                p[4 * C + c] += e;
            }
        for (int s = 1; s < n; s++)
            if (t - s >= t0 && t - s < t1) {
                float *before = o - s * X;
                const float *ws = w + (3 - s) * C;
                APART
                for (long c = 0; c < C; c++) before[c] += ws[c] * d[c];
            }
    }
}

// ---- gated norm ----

static void normalize(const Mix *m, long job, float *scratch) {
    long I = inner_(m), G = m->norm_groups, S = I / G, T = m->tokens, b = job / blocks_(m), t0 = job % blocks_(m) * BLOCK;
    long end = b * T + (t0 + BLOCK < T ? t0 + BLOCK : T);
    (void)scratch;
    for (long i = b * T + t0; i < end; i++)
        for (long g = 0; g < G; g++) {
            const float *y = m->y + i * I + g * S, *z = m->projected + i * width_(m) + g * S, *w = m->norm_weight + g * S;
            float *o = m->out + i * I + g * S, sum = 0;
            APART
            for (long s = 0; s < S; s++) {
                float a = y[s] * z[s] * sigmoid_(z[s]);
                o[s] = a;
                sum += a * a;
            }
            float k = 1.f / sqrtf(sum / S + (float)m->epsilon);
            m->reciprocal[i * G + g] = k;
            APART
            for (long s = 0; s < S; s++) o[s] *= k * w[s];
        }
}

static void normalize_back(const Mix *m, long job, float *scratch) {
    long I = inner_(m), G = m->norm_groups, S = I / G, T = m->tokens, b = job / blocks_(m), t0 = job % blocks_(m) * BLOCK;
    long end = b * T + (t0 + BLOCK < T ? t0 + BLOCK : T);
    float *addend = m->norm_by_job + job * I;
    (void)scratch;
    memset(addend, 0, sizeof(float) * I);
    for (long i = b * T + t0; i < end; i++)
        for (long g = 0; g < G; g++) {
            const float *y = m->y + i * I + g * S, *z = m->projected + i * width_(m) + g * S, *w = m->norm_weight + g * S, *d = m->d_out + i * I + g * S;
            float *dy = m->d_y + i * I + g * S, *dz = m->d_projected + i * width_(m) + g * S, *dw = addend + g * S;
            float k = m->reciprocal[i * G + g], mean = 0;
            APART
            for (long s = 0; s < S; s++) {
                float q = sigmoid_(z[s]), h = z[s] * q, n = y[s] * h * k;
                dy[s] = h;
                dz[s] = q;
                mean += d[s] * w[s] * n;
                dw[s] += d[s] * n;
            }
            mean /= S;
            APART
            for (long s = 0; s < S; s++) {
                float h = dy[s], q = dz[s], da = k * (d[s] * w[s] - y[s] * h * k * mean);
                dy[s] = da * h;
                dz[s] = da * y[s] * (q + h * (1.f - q));
            }
        }
}

// ---- scan ----

// One chunk of one row and group: its q tokens, its slices of the convolved channels, and where its documents begin.
typedef struct { long b, g, c, t0, q, row, C; const float *x, *B, *Cs; const int *starts; } Chunk;

static Chunk chunk_of(const Mix *m, long b, long g, long c) {
    long T = m->tokens, C = channels_(m), t0 = c * Q, row = b * T + t0;
    const float *at = m->convolved + row * C;
    Chunk k = {b, g, c, t0, T - t0 < Q ? T - t0 : Q, row, C, at, at + inner_(m) + g * m->state, at + inner_(m) + (m->groups + g) * m->state, m->starts ? m->starts + row : 0};
    return k;
}
// The first token of the chunk that token i of it sees, and whether it sees the state that enters.
INLINE long first_seen(const Chunk *k, long i) { return k->starts && k->starts[i] > k->t0 ? k->starts[i] - k->t0 : 0; }
INLINE int sees_state(const Chunk *k, long i) { return !k->starts || k->starts[i] < k->t0; }

// dt after softplus, and the logarithm to base 2 of the decay since the last start of a chunk or document, for each head
static void gates_of(const Mix *m, long b, long h) {
    long T = m->tokens, X = width_(m), at = (b * m->heads + h) * T;
    const float *raw = m->projected + b * T * X + X - m->heads + h;
    float *dt = m->gates + at, *decay = dt + m->rows * m->heads * T, A = -expf(m->A_log[h]) * LOG2E, sum = 0;
    for (long t = 0; t < T; t++) {
        float v = raw[t * X] + m->dt_bias[h];
        dt[t] = v > 20.f ? v : log1pf(expf(v));
        sum = t % Q == 0 || (m->starts && m->starts[b * T + t] == t) ? A * dt[t] : sum + A * dt[t];
        decay[t] = sum;
    }
}

// The lower triangle of S [Q, Q] = A [q, N] B^T, by tiles; Bt [N, Q]. Numbers right of the diagonal's 16 stay as they are.
static void triangle(long q, long N, const float *A, long lda, const float *Bt, float *S) {
    for (long i = 0; i < q; i += TALL) {
        long r = q - i < TALL ? q - i : TALL;
        product(r, (i + r + 15) / 16 * 16, N, A + i * lda, lda, 1, Bt, Q, S + i * Q, Q, 0);
    }
}

// A row of a triangle that is known up to n: a tile of rows reads up to 5 numbers further.
INLINE void clear_rest(float *row, long n) {
    for (long j = n; j < n + 16 && j < Q; j++) row[j] = 0;
}

static void scan_chunk(const Mix *m, const Chunk *k, long h, const float *S, float *state, float *M, float *weighted) {
    long q = k->q, C = k->C, P = m->head_dim, N = m->state, I = inner_(m), last = q - 1, at = (k->b * m->heads + h) * m->tokens + k->t0;
    const float *dt = m->gates + at, *decay = dt + m->rows * m->heads * m->tokens, *x = k->x + h * P;
    float *y = m->y + k->row * I + h * P, D = m->D[h];
    for (long i = 0; i < q; i++) {
        long lo = first_seen(k, i), n = (i + 16) / 16 * 16;
        APART
        for (long j = 0; j < n; j++) {
            float e = exp2_(decay[i] - decay[j]) * dt[j] * S[i * Q + j];
            M[i * Q + j] = (j >= lo) & (j <= i) ? e : 0.f;
        }
        clear_rest(M + i * Q, n);
        float e = sees_state(k, i) ? exp2_(decay[i]) : 0.f;
        APART
        for (long n = 0; n < N; n++) weighted[i * N + n] = e * k->Cs[i * C + n];
    }
    for (long i = 0; i < q; i += TALL) {
        long r = q - i < TALL ? q - i : TALL;
        product(r, P, i + r, M + i * Q, Q, 1, x, C, y + i * I, I, 0);
        for (long l = i; l < i + r; l++)
            APART
            for (long p = 0; p < P; p++) y[l * I + p] += D * x[l * C + p];
    }
    if (k->c || m->entering) product(q, P, N, weighted, N, 1, state, P, y, I, 1);
    float carry = sees_state(k, last) ? exp2_(decay[last]) : 0.f;
    long lo = first_seen(k, last);
    for (long j = 0; j < q; j++) {
        float e = j >= lo ? exp2_(decay[last] - decay[j]) * dt[j] : 0.f;
        APART
        for (long n = 0; n < N; n++) weighted[j * N + n] = e * k->B[j * C + n];
    }
    for (long s = 0; s < N * P; s++) state[s] = carry == 0.f ? 0.f : carry * state[s];
    product(N, P, q, weighted, 1, N, x, C, state, P, 1);
}

static void heads_of(const Mix *m, long part, long *from, long *to) { // heads of a group that a part scans
    long R = m->heads / m->groups;
    *from = R * part / m->parts;
    *to = R * (part + 1) / m->parts;
}

static void scan(const Mix *m, long job, float *scratch) {
    long N = m->state, P = m->head_dim, R = m->heads / m->groups, chunks = (m->tokens + Q - 1) / Q;
    long b = job / (m->groups * m->parts), g = job / m->parts % m->groups, from, to;
    float *S = scratch, *M = S + Q * Q, *Bt = M + Q * Q, *weighted = Bt + Q * N, *states = weighted + Q * N;
    heads_of(m, job % m->parts, &from, &to);
    memset(states, 0, sizeof(float) * (to - from) * N * P);
    if (m->entering) memcpy(states, m->entering + (b * m->heads + g * R + from) * N * P, sizeof(float) * (to - from) * N * P);
    for (long r = from; r < to; r++) gates_of(m, b, g * R + r);
    for (long c = 0; c < chunks; c++) {
        Chunk k = chunk_of(m, b, g, c);
        transpose_chunk(k.q, N, k.B, k.C, Bt);
        triangle(k.q, N, k.Cs, k.C, Bt, S);
        for (long r = from; r < to; r++) {
            float *state = states + (r - from) * N * P;
            memcpy(m->states + ((b * chunks + c) * m->heads + g * R + r) * N * P, state, sizeof(float) * N * P);
            scan_chunk(m, &k, g * R + r, S, state, M, weighted);
        }
    }
    if (m->leaving) memcpy(m->leaving + (b * m->heads + g * R + from) * N * P, states, sizeof(float) * (to - from) * N * P);
}

// Memory of a scan's way back: matrices [Q, Q], [Q, P], [Q, N], [N, P], vectors [Q], and the gradients of states of a part's heads.
typedef struct { float *S, *M, *dM, *dS, *Xt, *Bt, *weighted, *E, *turned, *d_decay, *d_dt, *gate, *states; } Back;

// Gradients of a chunk's head out of its own tokens: of x, of the scores into dS, of the gates.
static float own_back(const Mix *m, const Chunk *k, long h, const Back *w, const float *dt, const float *decay, float *dx) {
    long q = k->q, P = m->head_dim, I = inner_(m);
    const float *dy = m->d_y + k->row * I + h * P;
    float d_D = 0;
    transpose_chunk(q, P, k->x + h * P, k->C, w->Xt);
    triangle(q, P, dy, I, w->Xt, w->dM);
    for (long j = 0; j < Q; j++) w->d_decay[j] = w->d_dt[j] = 0;
    for (long i = 0; i < q; i++) {
        long lo = first_seen(k, i), n = (i + 16) / 16 * 16;
        float *M = w->M + i * Q, *dM = w->dM + i * Q, *dS = w->dS + i * Q, *d_dt = w->d_dt, sum = 0, now = decay[i];
        const float *S = w->S + i * Q;
        d_D += dM[i];
        APART
        for (long j = 0; j < n; j++) {
            float e = exp2_(now - decay[j]) * dt[j];
            int seen = (j >= lo) & (j <= i);
            float l = seen ? e : 0.f, s = seen ? S[j] : 0.f, d = seen ? dM[j] : 0.f, a = l * s, t = d * a;
            M[j] = a;
            dS[j] += l * d;
            sum += t;
            d_dt[j] += t;
        }
        clear_rest(M, n);
        w->d_decay[i] += sum;
    }
    for (long j = 0; j < q; j += TALL) // dx = M^T dy: token j meets those from j on
        product(q - j < TALL ? q - j : TALL, P, q - j, w->M + j * Q + j, 1, Q, dy + j * I, I, dx + j * k->C, k->C, 0);
    for (long j = 0; j < q; j++)
        APART
        for (long p = 0; p < P; p++) dx[j * k->C + p] += m->D[h] * dy[j * I + p];
    return d_D;
}

// Gradients through the state that leaves: of x, of B (added to dB), of the gates; d_state becomes that of what entered.
static void leaving_back(const Mix *m, const Chunk *k, long h, const Back *w, const float *dt, const float *decay, const float *entered, float *d_state, float *dx, float *dB, long ld) {
    long q = k->q, P = m->head_dim, N = m->state, last = q - 1, lo = first_seen(k, last);
    float carry = sees_state(k, last) ? exp2_(decay[last]) : 0.f, d_end = 0, s = 0;
    transpose(N, P, d_state, P, w->turned, N);
    product(q, N, P, k->x + h * P, k->C, 1, w->turned, N, w->E, N, 0);
    for (long j = 0; j < q; j++) {
        float e = j >= lo ? exp2_(decay[last] - decay[j]) * dt[j] : 0.f, sum = 0, *d = dB + j * ld, *a = w->weighted + j * N;
        const float *E = w->E + j * N, *B = k->B + j * k->C;
        if (e == 0.f) { memset(a, 0, sizeof(float) * N); continue; }
        APART
        for (long n = 0; n < N; n++) { sum += E[n] * B[n]; d[n] += e * E[n]; a[n] = e * B[n]; }
        w->d_dt[j] += e * sum;
        d_end += e * sum;
    }
    product(q, P, N, w->weighted, N, 1, d_state, P, dx, k->C, 1);
    if (carry != 0.f) {
        for (long i = 0; i < N * P; i++) s += entered[i] * d_state[i];
        d_end += carry * s;
    }
    for (long i = 0; i < N * P; i++) d_state[i] = carry == 0.f ? 0.f : carry * d_state[i];
    w->d_decay[last] += d_end;
}

// Gradients through the state that entered: of C (added to dC), of the gates; d_state gets what the chunk's outputs add.
static void entering_back(const Mix *m, const Chunk *k, long h, const Back *w, const float *decay, const float *entered, float *d_state, float *dC, long ld) {
    long q = k->q, P = m->head_dim, N = m->state, I = inner_(m);
    const float *dy = m->d_y + k->row * I + h * P;
    transpose(N, P, entered, P, w->turned, N);
    product(q, N, P, dy, I, 1, w->turned, N, w->E, N, 0);
    for (long i = 0; i < q; i++) {
        float e = sees_state(k, i) ? exp2_(decay[i]) : 0.f, sum = 0, *d = dC + i * ld, *a = w->weighted + i * N;
        const float *E = w->E + i * N, *c = k->Cs + i * k->C;
        if (e == 0.f) { memset(a, 0, sizeof(float) * N); continue; }
        APART
        for (long n = 0; n < N; n++) { sum += E[n] * c[n]; d[n] += e * E[n]; a[n] = e * c[n]; }
        w->d_decay[i] += e * sum;
    }
    long sees = q; // tokens that see the state come first: only they add to its gradient
    while (sees > 0 && !sees_state(k, sees - 1)) sees--;
    product(N, P, sees, w->weighted, 1, N, dy, I, d_state, P, 1);
}

// Gradients of dt as it lies in the projection, of A_log and of dt's bias, out of those of decays and of dt.
static void gates_back(const Mix *m, const Chunk *k, long h, const Back *w, const float *dt, float *d_heads) {
    long X = width_(m), at = k->row * X + X - m->heads + h;
    float A = -expf(m->A_log[h]), sum = 0;
    for (long j = k->q - 1; j >= 0; j--) {
        sum += w->d_decay[j] - w->d_dt[j];
        float d = sum * A + w->d_dt[j] / (dt[j] > 1e-30f ? dt[j] : 1e-30f);
        float raw = d / (1.f + expf(-(m->projected[at + j * X] + m->dt_bias[h])));
        d_heads[h] += sum * dt[j] * A;
        d_heads[m->heads + h] += raw;
        m->d_projected[at + j * X] = raw;
        if (k->starts && k->starts[j] == k->t0 + j) sum = 0;
    }
}

static void scan_back(const Mix *m, long job, float *scratch) {
    long N = m->state, P = m->head_dim, R = m->heads / m->groups, T = m->tokens, chunks = (T + Q - 1) / Q, shared = m->groups * N;
    long part = job % m->parts, b = job / (m->groups * m->parts), g = job / m->parts % m->groups, from, to;
    float *S = scratch, *Xt = S + 4 * Q * Q, *Bt = Xt + Q * P, *turned = Bt + 3 * Q * N, *d_decay = turned + N * P;
    Back w = {S, S + Q * Q, S + 2 * Q * Q, S + 3 * Q * Q, Xt, Bt, Bt + Q * N, Bt + 2 * Q * N, turned, d_decay, d_decay + Q, d_decay + 2 * Q, d_decay + 3 * Q};
    heads_of(m, part, &from, &to);
    memset(w.states, 0, sizeof(float) * (to - from) * N * P);
    for (long c = chunks - 1; c >= 0; c--) {
        Chunk k = chunk_of(m, b, g, c);
        float *d = m->d_convolved + k.row * k.C, *dB = d + inner_(m) + g * N, *dC = dB + shared;
        long ld = k.C;
        if (part) { dB = m->d_shared + ((part - 1) * m->rows * T + k.row) * 2 * shared + g * N; dC = dB + shared; ld = 2 * shared; }
        for (long j = 0; j < k.q; j++) { memset(dB + j * ld, 0, sizeof(float) * N); memset(dC + j * ld, 0, sizeof(float) * N); }
        transpose_chunk(k.q, N, k.B, k.C, w.Bt);
        triangle(k.q, N, k.Cs, k.C, w.Bt, w.S);
        memset(w.dS, 0, sizeof(float) * Q * Q);
        for (long r = from; r < to; r++) {
            long h = g * R + r, at = (b * m->heads + h) * T + k.t0;
            const float *dt = m->gates + at, *decay = dt + m->rows * m->heads * T, *entered = m->states + ((b * chunks + c) * m->heads + h) * N * P;
            float *d_state = w.states + (r - from) * N * P, *d_heads = m->heads_by_row + b * 3 * m->heads;
            if (c == chunks - 1) d_heads[h] = d_heads[m->heads + h] = d_heads[2 * m->heads + h] = 0;
            d_heads[2 * m->heads + h] += own_back(m, &k, h, &w, dt, decay, d + h * P);
            if (c < chunks - 1) leaving_back(m, &k, h, &w, dt, decay, entered, d_state, d + h * P, dB, ld);
            if (c) entering_back(m, &k, h, &w, decay, entered, d_state, dC, ld);
            gates_back(m, &k, h, &w, dt, d_heads);
        }
        for (long i = 0; i < k.q; i += TALL) {
            long r = k.q - i < TALL ? k.q - i : TALL;
            product(r, N, i + r, w.dS + i * Q, Q, 1, k.B, k.C, dC + i * ld, ld, 1);
            product(r, N, k.q - i, w.dS + i * Q + i, 1, Q, k.Cs + i * k.C, k.C, dB + i * ld, ld, 1);
        }
    }
}

static void add_parts(const Mix *m, long job, float *scratch) { // of row `job`: B's and C's gradients of the other parts
    long wide = 2 * m->groups * m->state, C = channels_(m), T = m->tokens;
    (void)scratch;
    for (long t = job * T; t < (job + 1) * T; t++)
        for (long p = 0; p < m->parts - 1; p++)
            for (long n = 0; n < wide; n++) m->d_convolved[t * C + inner_(m) + n] += m->d_shared[(p * m->rows * T + t) * wide + n];
}

// ---- what is called ----

// All stages of one row, which then stay in the cache: where there are as many rows as threads need.
static void row(const Mix *m, long b, float *scratch, Job before, Job middle, Job after) {
    long jobs = m->groups * m->parts;
    for (long i = 0; i < blocks_(m); i++) before(m, b * blocks_(m) + i, scratch);
    for (long i = 0; i < jobs; i++) middle(m, b * jobs + i, scratch);
    if (middle == scan_back && m->parts > 1) add_parts(m, b, scratch);
    for (long i = 0; i < blocks_(m); i++) after(m, b * blocks_(m) + i, scratch);
}
static void row_forward(const Mix *m, long b, float *scratch) { row(m, b, scratch, convolve, scan, normalize); }
static void row_back(const Mix *m, long b, float *scratch) { row(m, b, scratch, normalize_back, scan_back, convolve_back); }

void mix_forward(const Mix *m) {
    if (m->rows >= 2 * m->threads || m->threads == 1) { each(m, row_forward, m->rows); return; }
    each(m, convolve, m->rows * blocks_(m));
    each(m, scan, m->rows * m->groups * m->parts);
    each(m, normalize, m->rows * blocks_(m));
}

void mix_backward(const Mix *m) {
    long blocks = m->rows * blocks_(m);
    if (m->rows >= 2 * m->threads || m->threads == 1) each(m, row_back, m->rows);
    else {
        each(m, normalize_back, blocks);
        each(m, scan_back, m->rows * m->groups * m->parts);
        if (m->parts > 1) each(m, add_parts, m->rows);
        each(m, convolve_back, blocks);
    }
    add_in_order(m->taps_by_job, blocks, 5 * channels_(m), m->d_taps);
    add_in_order(m->heads_by_row, m->rows, 3 * m->heads, m->d_heads);
    add_in_order(m->norm_by_job, blocks, inner_(m), m->d_norm);
}

// 0 if this processor runs what the compiler made of the arithmetic, and rightly.
int mix_check(void) {
    float A[4 * 20], B[20 * 64], C[4 * 64], wrong = 0;
    for (int i = 0; i < 80; i++) A[i] = (float)(i % 7) - 3;
    for (int i = 0; i < 20 * 64; i++) B[i] = (float)(i % 11) - 5;
    product(4, 64, 20, A, 20, 1, B, 64, C, 64, 0);
    for (int r = 0; r < 4; r++)
        for (int n = 0; n < 64; n++) {
            float sum = 0;
            for (int k = 0; k < 20; k++) sum += A[r * 20 + k] * B[k * 64 + n];
            wrong += sum != C[r * 64 + n];
        }
    for (int i = -40; i < 40; i++) wrong += fabsf(exp2_((float)i * .37f) / exp2f((float)i * .37f) - 1.f) > 1e-6f;
    return wrong != 0;
}

// Experts of few rows in float32 on a CPU, for decoding: each expert's matrix is read once, from where it lies.
// A pair's numbers do not depend on the other pairs, nor on threads: each is a dot product of its own, in one order.
#include <math.h>

typedef struct {
    long pairs, experts, outputs, inputs, top_k, threads, next; // pairs: rows times top_k, those of a row side by side
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned); // GOMP_parallel of the OpenMP that PyTorch runs on, or none
    const float *matrices, *x, *weights; // [E, O, I]; x [rows, I], or [pairs, I] with weights [pairs]
    const long *ids;                     // [pairs]
    float *y;                            // [pairs, O]; with weights [rows, O], the weighted sum of a row's pairs
} Rows;

long given_size(void) { return sizeof(Rows); }

#define BLOCK 32 // outputs a job

static float dot(const float *a, const float *b, long n) {
    float sum = 0;
    for (long i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

static void block(const Rows *r, long from, long to) {
    if (r->weights)
        for (long row = 0; row < r->pairs / r->top_k; row++)
            for (long o = from; o < to; o++) r->y[row * r->outputs + o] = 0;
    for (long e = 0; e < r->experts; e++)
        for (long p = 0; p < r->pairs; p++) {
            if (r->ids[p] != e) continue;
            long row = p / r->top_k;
            const float *x = r->x + (r->weights ? p : row) * r->inputs, *matrix = r->matrices + e * r->outputs * r->inputs;
            float *y = r->y + (r->weights ? row : p) * r->outputs, w = r->weights ? r->weights[p] : 0.f;
            for (long o = from; o < to; o++) {
                float sum = dot(matrix + o * r->inputs, x, r->inputs);
                y[o] = r->weights ? y[o] + w * sum : sum;
            }
        }
}

static void work(void *given) {
    Rows *r = given;
    long blocks = (r->outputs + BLOCK - 1) / BLOCK;
    for (long b; (b = __atomic_fetch_add(&r->next, 1, __ATOMIC_RELAXED)) < blocks;)
        block(r, b * BLOCK, (b + 1) * BLOCK < r->outputs ? (b + 1) * BLOCK : r->outputs);
}

void rows_forward(Rows *r) {
    r->next = 0;
    // Below some 100 us of work the start of threads costs more than they give.
    if (r->parallel && r->threads > 1 && r->pairs * r->outputs * r->inputs > 1000000) r->parallel(work, r, (unsigned)r->threads, 0);
    else work(r);
}

// 0 if this processor runs what the compiler made.
int mix_check(void) {
    float matrices[2 * 3 * 20], x[20], y[3];
    long ids[1] = {1};
    for (int i = 0; i < 120; i++) matrices[i] = (float)(i % 7);
    for (int i = 0; i < 20; i++) x[i] = (float)(i % 3);
    Rows r = {1, 2, 3, 20, 1, 1, 0, 0, matrices, x, 0, ids, y};
    rows_forward(&r);
    for (int o = 0; o < 3; o++) {
        float sum = 0;
        for (int i = 0; i < 20; i++) sum += matrices[60 + o * 20 + i] * x[i];
        if (sum != y[o]) return 1;
    }
    return 0;
}

// The router's choice for few tokens in float32 on a CPU, for decoding: scores, the top k by score and bias, their weights.
#include <math.h>

typedef struct {
    long rows, experts, top_k, score, normalize; // score: 0 softmax, 1 sigmoid, 2 the root of the softplus
    double scaling;
    void *parallel; // none: a row is too little
    const float *logits, *bias; // [rows, E], [E] or none
    float *scores, *weights;    // [rows, E], [rows, K]
    long *ids, *counts;         // [rows, K], [E] zeros
} Route;

long given_size(void) { return sizeof(Route); }

static void score(const Route *r, const float *l, float *s) {
    float most = -INFINITY, sum = 0;
    for (long e = 0; e < r->experts; e++) most = l[e] > most ? l[e] : most;
    for (long e = 0; e < r->experts; e++) {
        if (r->score == 0) sum += s[e] = expf(l[e] - most);
        else if (r->score == 1) s[e] = 1.f / (1.f + expf(-l[e]));
        else s[e] = sqrtf(l[e] > 20.f ? l[e] : log1pf(expf(l[e] < -80.f ? -80.f : l[e])));
    }
    if (r->score == 0)
        for (long e = 0; e < r->experts; e++) s[e] /= sum;
}

void route_forward(const Route *r) {
    for (long row = 0; row < r->rows; row++) {
        const float *l = r->logits + row * r->experts;
        float *s = r->scores + row * r->experts, *w = r->weights + row * r->top_k, sum = 0;
        long *ids = r->ids + row * r->top_k;
        score(r, l, s);
        for (long k = 0; k < r->top_k; k++) {
            long best = -1;
            float appeal = 0;
            for (long e = 0; e < r->experts; e++) {
                int taken = 0;
                for (long j = 0; j < k; j++) taken |= ids[j] == e;
                // Softmax keeps the order of logits, which have one where probabilities are zero. NaN is largest, to be seen.
                float a = r->bias ? s[e] + r->bias[e] : (r->score == 0 ? l[e] : s[e]);
                if (!taken && (best < 0 || a > appeal || (a != a && appeal == appeal))) { best = e; appeal = a; }
            }
            ids[k] = best;
            w[k] = s[best];
            sum += s[best];
            r->counts[best]++;
        }
        for (long k = 0; k < r->top_k; k++) w[k] = (r->normalize ? w[k] / (sum + 1e-20f) : w[k]) * (float)r->scaling;
    }
}

// 0 if this processor runs what the compiler made.
int mix_check(void) {
    float logits[3] = {1, 3, 2}, scores[3], weights[2];
    long ids[2], counts[3] = {0};
    Route r = {1, 3, 2, 0, 1, 1, 0, logits, 0, scores, weights, ids, counts};
    route_forward(&r);
    return !(ids[0] == 1 && ids[1] == 2 && fabsf(weights[0] + weights[1] - 1.f) < 1e-5f && counts[0] == 0);
}

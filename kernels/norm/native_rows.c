// The norm of few rows with the residual added first, in float32 on a CPU, for decoding: h = x + residual, y = h r w.
#include <math.h>

typedef struct {
    long rows, width;
    double epsilon;
    void *parallel; // none: a row is too little
    const float *x, *residual, *weight;
    float *h, *y; // h: x itself without a residual
} Norm;

long given_size(void) { return sizeof(Norm); }

void norm_forward(const Norm *n) {
    for (long row = 0; row < n->rows; row++) {
        long at = row * n->width;
        float *h = n->h + at, *y = n->y + at, sum = 0;
        if (n->residual)
            for (long i = 0; i < n->width; i++) h[i] = n->x[at + i] + n->residual[at + i];
        for (long i = 0; i < n->width; i++) sum += h[i] * h[i];
        float r = 1.f / sqrtf(sum / n->width + (float)n->epsilon);
        for (long i = 0; i < n->width; i++) y[i] = h[i] * r * n->weight[i];
    }
}

// 0 if this processor runs what the compiler made.
int mix_check(void) {
    float x[20], ones[20], h[20], y[20];
    for (int i = 0; i < 20; i++) x[i] = ones[i] = 1;
    Norm n = {1, 20, 0, 0, x, ones, ones, h, y};
    norm_forward(&n);
    return !(h[19] == 2.f && fabsf(y[19] - 1.f) < 1e-5f);
}

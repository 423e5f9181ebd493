/* One call of the engine: a kernel over many tensors, cut into blocks and spread over threads. */
#include "engine.h"

#include <stddef.h>
#include <string.h>

/* Read by the loader before any code runs: what this file was compiled for. */
EXPORT const int64_t torchopt_abi = TORCHOPT_ABI;
EXPORT const char torchopt_compiled_for[] =
#if defined(__AVX512F__)
    "AVX512";
#elif defined(__AVX2__)
    "AVX2";
#else
    "DEFAULT";
#endif

const struct kernel *torchopt_kernels_generic(void);
#if defined(TORCHOPT_X86)
const struct kernel *torchopt_kernels_avx2(void);
const struct kernel *torchopt_kernels_avx512(void);
#endif

static const struct kernel *kernels = NULL;
static const char *selected = NULL;

static int supports(const char *instruction_set) {
  if (strcmp(instruction_set, "generic") == 0) return 1;
#if defined(TORCHOPT_X86)
  __builtin_cpu_init();
  if (strcmp(instruction_set, "avx2") == 0)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (strcmp(instruction_set, "avx512") == 0)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("fma");
#endif
  return 0;
}

/* Use the kernels for an instruction set. Returns 0, or -1 if this machine has it not. */
int64_t torchopt_select(const char *instruction_set) {
  if (!supports(instruction_set)) return -1;
#if defined(TORCHOPT_X86)
  if (strcmp(instruction_set, "avx512") == 0) {
    kernels = torchopt_kernels_avx512();
    selected = "avx512";
    return 0;
  }
  if (strcmp(instruction_set, "avx2") == 0) {
    kernels = torchopt_kernels_avx2();
    selected = "avx2";
    return 0;
  }
#endif
  kernels = torchopt_kernels_generic();
  selected = "generic";
  return 0;
}

static void select_best(void) {
  if (kernels != NULL) return;
  if (torchopt_select("avx512") == 0) return;
  if (torchopt_select("avx2") == 0) return;
  torchopt_select("generic");
}

const char *torchopt_instruction_set(void) {
  select_best();
  return selected;
}

int64_t torchopt_count(void) {
  int64_t count = 0;
  select_best();
  while (kernels[count].name != NULL) ++count;
  return count;
}

/* The position of a kernel in the table, or -1. */
int64_t torchopt_find(const char *name) {
  select_best();
  for (int64_t k = 0; kernels[k].name != NULL; ++k)
    if (strcmp(kernels[k].name, name) == 0) return k;
  return -1;
}

/* Blocks ------------------------------------------------------------------------------------- */

/* Entries for which absent and half-precision streams have a stand-in. Small: all stand-ins of a
 * kernel together stay in the first-level cache. */
#define BLOCK 256
/* Entries below which a second thread costs more than it saves, and what threads divide. */
#define GRAIN 65536
#define ALIGNED 1024

static const double zeros[BLOCK]; /* zero bytes, whatever the type */

static float half_to_float(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000u) << 16, rest = h & 0x7fffu, bits;
  float value;
  if (rest >= 0x7c00u) { /* infinity, nan */
    bits = sign | 0x7f800000u | ((rest & 0x3ffu) << 13);
    memcpy(&value, &bits, 4);
    return value;
  }
  /* 2^112 undoes the difference of the exponents' biases, and makes subnormal numbers normal */
  bits = rest << 13;
  memcpy(&value, &bits, 4);
  value *= 5.192296858534828e33f;
  memcpy(&bits, &value, 4);
  bits |= sign;
  memcpy(&value, &bits, 4);
  return value;
}

static uint16_t float_to_half(float value) { /* round to nearest, ties to even */
  uint32_t bits;
  memcpy(&bits, &value, 4);
  uint16_t sign = (uint16_t)((bits >> 16) & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);
  if (bits >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u); /* 65520 and more */
  if (bits < 0x38800000u) {                                  /* subnormal: let addition round */
    float magic = 0.5f, sum;
    memcpy(&sum, &bits, 4);
    sum += magic;
    uint32_t rounded;
    memcpy(&rounded, &sum, 4);
    return (uint16_t)(sign | (rounded - 0x3f000000u));
  }
  uint32_t odd = (bits >> 13) & 1u;
  bits += 0xc8000fffu + odd; /* the difference of the biases, and almost half a unit */
  return (uint16_t)(sign | (bits >> 13));
}

static void widen(const uint16_t *from, float *to, int64_t size, int64_t dtype) {
  if (dtype == BFLOAT16) {
    for (int64_t i = 0; i < size; ++i) {
      uint32_t bits = (uint32_t)from[i] << 16;
      memcpy(to + i, &bits, 4);
    }
  } else {
    for (int64_t i = 0; i < size; ++i) to[i] = half_to_float(from[i]);
  }
}

static void narrow(const float *from, uint16_t *to, int64_t size, int64_t dtype) {
  if (dtype == BFLOAT16) {
    for (int64_t i = 0; i < size; ++i) {
      uint32_t bits;
      memcpy(&bits, from + i, 4);
      uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
      to[i] = from[i] != from[i] ? 0x7fc0u : (uint16_t)(rounded >> 16);
    }
  } else {
    for (int64_t i = 0; i < size; ++i) to[i] = float_to_half(from[i]);
  }
}

struct view { /* one tensor of a call */
  const char *in[MAX_STREAMS];
  char *out[MAX_STREAMS];
  const double *numbers;
};

static int64_t entry_size(const struct call *call, int64_t narrow, int k) {
  if (call->dtype == FLOAT64) return 8;
  return call->dtype != FLOAT32 && (narrow >> k & 1) ? 2 : 4;
}

static kernel_function function_of(const struct call *call) {
  const struct kernel *kernel = kernels + call->kernel;
  return call->dtype == FLOAT64 ? kernel->of_double : kernel->of_float;
}

/* Entries first..last-1 of one tensor whose streams are all there, in the kernel's own type. */
static void run_whole(const struct call *call, const struct view *view, int64_t first,
                      int64_t last) {
  const struct kernel *kernel = kernels + call->kernel;
  const void *in[MAX_STREAMS];
  void *out[MAX_STREAMS];
  int64_t bytes = first * (call->dtype == FLOAT64 ? 8 : 4);
  for (int k = 0; k < kernel->inputs; ++k) in[k] = view->in[k] + bytes;
  for (int k = 0; k < kernel->outputs; ++k) out[k] = view->out[k] + bytes;
  function_of(call)(in, out, view->numbers, last - first);
}

/* The same, block by block, with stand-ins for what is absent or in half precision. */
static void run_blocks(const struct call *call, const struct view *view, int64_t first,
                       int64_t last) {
  const struct kernel *kernel = kernels + call->kernel;
  float wide_in[MAX_STREAMS][BLOCK];
  double wide_out[MAX_STREAMS][BLOCK]; /* also takes what is dropped, of either type */
  const void *in[MAX_STREAMS];
  void *out[MAX_STREAMS];
  for (int64_t at = first; at < last; at += BLOCK) {
    int64_t size = last - at < BLOCK ? last - at : BLOCK;
    for (int k = 0; k < kernel->inputs; ++k) {
      int64_t bytes = entry_size(call, call->narrow_in, k);
      const char *from = view->in[k];
      in[k] = from == NULL ? (const void *)zeros : from + at * bytes;
      if (from != NULL && bytes == 2) {
        widen((const uint16_t *)(from + at * bytes), wide_in[k], size, call->dtype);
        in[k] = wide_in[k];
      }
    }
    for (int k = 0; k < kernel->outputs; ++k) {
      int64_t bytes = entry_size(call, call->narrow_out, k);
      int direct = view->out[k] != NULL && bytes != 2;
      out[k] = direct ? (void *)(view->out[k] + at * bytes) : (void *)wide_out[k];
    }
    function_of(call)(in, out, view->numbers, size);
    for (int k = 0; k < kernel->outputs; ++k)
      if (view->out[k] != NULL && entry_size(call, call->narrow_out, k) == 2)
        narrow((const float *)wide_out[k], (uint16_t *)(view->out[k] + at * 2), size, call->dtype);
  }
}

/* Returns whether all streams of tensor number t are there in the kernel's own type. */
static int look_at(const struct call *call, int64_t t, struct view *view) {
  const struct kernel *kernel = kernels + call->kernel;
  int whole = call->dtype == FLOAT64 || call->dtype == FLOAT32;
  for (int k = 0; k < kernel->inputs; ++k) {
    view->in[k] = (const char *)(intptr_t)call->in[k * call->count + t];
    whole = whole && view->in[k] != NULL;
  }
  for (int k = 0; k < kernel->outputs; ++k) {
    view->out[k] = (char *)(intptr_t)call->out[k * call->count + t];
    whole = whole && view->out[k] != NULL;
  }
  view->numbers = call->numbers + (call->rows == NULL ? 0 : call->rows[t] * call->width);
  return whole;
}

struct work {
  const struct call *call;
  int64_t total, shares;
};

/* One thread's share: a range of the entries of all tensors laid end to end. */
static void run_share(void *context, int64_t share) {
  const struct work *work = context;
  const struct call *call = work->call;
  int64_t size = (work->total / work->shares / ALIGNED + 1) * ALIGNED;
  int64_t begin = share * size, end = begin + size, start = 0;
  for (int64_t t = 0; t < call->count && start < end; ++t) {
    int64_t stop = start + call->sizes[t];
    int64_t first = begin > start ? begin - start : 0;
    int64_t last = (end < stop ? end : stop) - start;
    if (first < last) {
      struct view view;
      if (look_at(call, t, &view))
        run_whole(call, &view, first, last);
      else
        run_blocks(call, &view, first, last);
    }
    start = stop;
  }
}

/* Run one kernel over many tensors. Returns 0, or a negative number for a call that makes no
 * sense; nothing has been written then. */
int64_t torchopt_run(struct call *call) {
  int64_t total = 0;
  call->done = 0;
  select_best();
  if (call->kernel < 0 || call->kernel >= torchopt_count()) return -1;
  if (kernels[call->kernel].inputs > MAX_STREAMS || kernels[call->kernel].outputs > MAX_STREAMS)
    return -2;
  if (call->dtype < FLOAT64 || call->dtype > FLOAT16 || call->count < 0) return -3;
  for (int64_t t = 0; t < call->count; ++t) {
    if (call->sizes[t] < 0) return -4;
    total += call->sizes[t];
  }
  struct work work = {call, total, call->threads < 1 ? 1 : call->threads};
  if (work.shares > total / GRAIN) work.shares = total / GRAIN > 0 ? total / GRAIN : 1;
  if (work.shares == 1)
    run_share(&work, 0);
  else
    run_in_parallel(run_share, &work, work.shares);
  call->done = 1;
  return 0;
}

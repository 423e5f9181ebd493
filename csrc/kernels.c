/* The kernels, compiled once for each instruction set; TORCHOPT_ISA is its name.
 *
 * kernels.inc is generated from the rules (csrc/catalogue.py) and included here once
 * for float and once for double. A kernel reads its input operands and writes its output operands
 * entry by entry. An output operand may be an input operand (in place): an entry is read before it
 * is written, so there is no dependence between entries and the loop may be vectorised.
 */
#include "engine.h"

#include <math.h>
#include <stddef.h>
#include <string.h>

#if defined(__clang__)
/* loops that call the C library have no vectors */
#pragma clang diagnostic ignored "-Wpass-failed"
#define INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define INDEPENDENT _Pragma("GCC ivdep")
#elif defined(_MSC_VER)
#define INDEPENDENT __pragma(loop(ivdep))
#else
#define INDEPENDENT
#endif
#define EACH_ENTRY INDEPENDENT for (int64_t i = 0; i < size; ++i)
/* The same for a loop of very few instructions. */
#if defined(__GNUC__) && !defined(__clang__)
#define EACH_ENTRY_UP_TO(end) \
  _Pragma("GCC unroll 4") INDEPENDENT for (int64_t i = 0; i < (end); ++i)
#else
#define EACH_ENTRY_UP_TO(end) INDEPENDENT for (int64_t i = 0; i < (end); ++i)
#endif

/* nan is passed on, as torch.maximum and torch.minimum do */
#define MAXIMUM(a, b) ((a) > (b) || (a) != (a) ? (a) : (b))
#define MINIMUM(a, b) ((a) < (b) || (a) != (a) ? (a) : (b))

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define KERNEL(name)                                                              \
  static void JOIN(name, SUFFIX)(const void *const *in_, void *const *out_,       \
                                 const double *n, int64_t size)
#define STREAMS                       \
  const R *const *const in = (const R *const *)in_; \
  R *const *const out = (R *const *)out_; \
  (void)n;

/* Entries of the widest vector. */
#define LANES 16
/* What all that a program touches may take of the first-level cache. */
#define CACHE 24576
#define MAX_BLOCK 512
#define MIN_BLOCK 64
#define REGISTER_ENTRIES (MAX_REGISTERS * MIN_BLOCK)

/* Entries of one register. */
static int64_t block_of(const struct program *program, size_t entry) {
  int64_t blocks = program->inputs + program->outputs + program->registers;
  int64_t fits = CACHE / (int64_t)entry / (blocks + 1) & ~(int64_t)(LANES - 1);
  int64_t room = REGISTER_ENTRIES / (program->registers + 1) & ~(int64_t)(LANES - 1);
  fits = fits > MAX_BLOCK ? MAX_BLOCK : fits < MIN_BLOCK ? MIN_BLOCK : fits;
  return fits < room ? fits : room;
}

#define FUNCTIONS_OF_FLOAT
#include "functions.inc"
#undef FUNCTIONS_OF_FLOAT
#include "functions.inc"

#include "operations.inc"
#define Va a[i]
#define Vb b[i]
#define Vc c[i]
#define Vd d[i]
#define Na a0
#define Nb b0
#define Nc c0
#define Nd d0

#define R float
#define SUFFIX _float
#define SQRT sqrtf
#define ABS fabsf
#define EXP exp_of_float
#define LOG log_of_float
#define EXPM1 expm1_of_float
#define LOG1P log1p_of_float
#define TANH tanh_of_float
#define SIGMOID sigmoid_of_float
#define POW powf
#include "kernels.inc"
#include "interpreter.inc"
#undef R
#undef SUFFIX
#undef SQRT
#undef ABS
#undef EXP
#undef LOG
#undef EXPM1
#undef LOG1P
#undef TANH
#undef SIGMOID
#undef POW
#undef ALL_KERNELS

#define R double
#define SUFFIX _double
#define SQRT sqrt
#define ABS fabs
#define EXP exp
#define LOG log
#define EXPM1 expm1
#define LOG1P log1p
#define TANH tanh
#define SIGMOID sigmoid_of_double
#define POW pow
#include "kernels.inc"
#include "interpreter.inc"

/* Half precision ------------------------------------------------------------------------------ */

/* The conversions choose by value and never branch, so that their loops can be vectorised; memcpy
 * because half-precision tensors may lie at any address. */

static float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

static uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

static float from_float16(uint16_t half) {
  uint32_t sign = (uint32_t)(half & 0x8000u) << 16, rest = (uint32_t)(half & 0x7fffu) << 13;
  /* 2^112 undoes the difference of the exponents' biases, and makes subnormal numbers normal */
  uint32_t finite = float_to_bits(bits_to_float(rest) * 0x1p112f);
  return bits_to_float(sign | (rest >= 0x0f800000u ? rest | 0x7f800000u : finite));
}

static uint16_t to_float16(float value) { /* round to nearest, ties to even */
  uint32_t bits = float_to_bits(value), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
  /* the difference of the biases, and almost half a unit */
  uint32_t normal = (rest + 0xc8000fffu + (rest >> 13 & 1u)) >> 13;
  /* let an addition round: the sum's last bit is worth one unit of a subnormal half */
  uint32_t subnormal = float_to_bits(bits_to_float(rest) + 0.5f) - 0x3f000000u;
  uint32_t finite = rest < 0x38800000u ? subnormal : normal;
  uint32_t large = rest > 0x7f800000u ? 0x7e00u : 0x7c00u; /* nan; infinity, from 65520 on */
  return (uint16_t)(sign | (rest < 0x477ff000u ? finite : large));
}

static float from_bfloat16(uint16_t half) { return bits_to_float((uint32_t)half << 16); }

static uint16_t to_bfloat16(float value) {
  uint32_t bits = float_to_bits(value), rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

#define WIDEN(name)                                                    \
  static void widen_##name(const char *from, float *to, int64_t size) { \
    for (int64_t i = 0; i < size; ++i) {                               \
      uint16_t half;                                                   \
      memcpy(&half, from + 2 * i, 2);                                  \
      to[i] = from_##name(half);                                       \
    }                                                                  \
  }
#define NARROW(name)                                                    \
  static void narrow_##name(const float *from, char *to, int64_t size) { \
    for (int64_t i = 0; i < size; ++i) {                                \
      uint16_t half = to_##name(from[i]);                               \
      memcpy(to + 2 * i, &half, 2);                                     \
    }                                                                   \
  }
WIDEN(bfloat16)
WIDEN(float16)
NARROW(bfloat16)
NARROW(float16)

/* Sums ---------------------------------------------------------------------------------------- */

#define ADD_UP(name)                                                                  \
  static void add_up_##name(const void *from_, double *lanes, int64_t size) {          \
    const name *from = from_;                                                         \
    double sums[SUM_LANES];                                                               \
    int64_t i = 0;                                                                    \
    memcpy(sums, lanes, sizeof sums);                                                 \
    for (; i + SUM_LANES <= size; i += SUM_LANES)                                             \
      for (int k = 0; k < SUM_LANES; ++k) sums[k] += (double)from[i + k];                 \
    for (int k = 0; i + k < size; ++k) sums[k] += (double)from[i + k];                \
    memcpy(lanes, sums, sizeof sums);                                                 \
  }
ADD_UP(double)
ADD_UP(float)

/* The table ----------------------------------------------------------------------------------- */

#define DESCRIBED(name, arguments, value) {#name, arguments},
static const struct operation operations[] = {OPERATIONS(DESCRIBED)};

#define ENTRY(name, inputs, outputs) {#name, inputs, outputs, name##_float, name##_double},
static const struct kernel kernels[] = {ALL_KERNELS};

#define STRING_(a) #a
#define STRING(a) STRING_(a)
const struct kernel_table JOIN(torchopt_kernels_, TORCHOPT_ISA) = {
    STRING(TORCHOPT_ISA),
    kernels,
    sizeof kernels / sizeof kernels[0],
    {add_up_double, add_up_float},
    operations,
    sizeof operations / sizeof operations[0],
    interpret_float,
    interpret_double,
    {widen_bfloat16, widen_float16},
    {narrow_bfloat16, narrow_float16},
};

/* The kernels, compiled once for each instruction set; TORCHOPT_ISA is its name.
 *
 * kernels.inc is generated from the rules (torchopt/kernels/catalogue.py) and included here once
 * for float and once for double. A kernel reads its input streams and writes its output streams
 * entry by entry. An output stream may be an input stream (in place): an entry is read before it
 * is written, so there is no dependence between entries and the loop may be vectorised.
 */
#include "engine.h"

#include <math.h>
#include <stddef.h>

#if defined(__clang__)
#define EACH_ENTRY \
  _Pragma("clang loop vectorize(assume_safety)") for (int64_t i = 0; i < size; ++i)
#elif defined(__GNUC__)
#define EACH_ENTRY _Pragma("GCC ivdep") for (int64_t i = 0; i < size; ++i)
#elif defined(_MSC_VER)
#define EACH_ENTRY __pragma(loop(ivdep)) for (int64_t i = 0; i < size; ++i)
#else
#define EACH_ENTRY for (int64_t i = 0; i < size; ++i)
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

#define R float
#define SUFFIX _float
#define SQRT sqrtf
#define ABS fabsf
#include "kernels.inc"
#undef R
#undef SUFFIX
#undef SQRT
#undef ABS
#undef ALL_KERNELS

#define R double
#define SUFFIX _double
#define SQRT sqrt
#define ABS fabs
#include "kernels.inc"

#define ENTRY(name, inputs, outputs) {#name, inputs, outputs, name##_float, name##_double},
static const struct kernel table[] = {ALL_KERNELS{NULL, 0, 0, NULL, NULL}};

const struct kernel *JOIN(torchopt_kernels_, TORCHOPT_ISA)(void) { return table; }

/* The fused engine: plain pointers and sizes, no torch, no Python. */
#ifndef TORCHOPT_ENGINE_H
#define TORCHOPT_ENGINE_H

#include <stdint.h>

/* Layout of this interface; torchopt/kernels/native.py refuses another one. */
#define TORCHOPT_ABI 4

/* Streams in each direction: a bit each of a signed mask. */
#define MAX_STREAMS 63
#define MAX_NUMBERS 1024

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

/* A variable that several threads read and write. */
#if defined(_MSC_VER)
#define ATOMIC volatile
#else
#define ATOMIC _Atomic
#endif

typedef void (*kernel_function)(const void *const *in, void *const *out, const double *numbers,
                                int64_t size);

struct kernel {
  const char *name;
  int inputs, outputs;
  kernel_function of_float, of_double;
};

/* Entry k of a block is added to sum k % SUM_LANES: an order that no instruction set changes. */
#define SUM_LANES 16

/* Programs: what the interpreter runs (interpreter.inc). An instruction is the position of an
 * operation, the place of its result and the places of four arguments (those that it does not have
 * are not read). Places are counted through the inputs, the outputs, the numbers, the registers. */
#define INSTRUCTION 6
#define MAX_REGISTERS 256
#define MAX_LENGTH 65536

struct program {
  int64_t inputs, outputs, numbers, registers;
  int64_t length; /* instructions */
  const int32_t *code;
};

typedef void (*operation_function)(char *const *place, const int32_t *code, int64_t size);
typedef void (*program_function)(const struct program *program, const void *const *in,
                                 void *const *out, const double *numbers, int64_t size);

struct operation {
  const char *name;
  const char *arguments; /* v for each that is a block, n for each that is a number */
};

/* The kernels compiled for one instruction set; a constant in kernels.c. */
struct kernel_table {
  const char *instruction_set;
  const struct kernel *kernels;
  int64_t count;
  void (*add_up[2])(const void *from, double *lanes, int64_t size); /* float64, float32 */
  const struct operation *operations; /* of programs */
  int64_t operation_count;
  program_function interpret_float, interpret_double;
  void (*widen[2])(const char *from, float *to, int64_t size); /* bfloat16, float16 */
  void (*narrow[2])(const float *from, char *to, int64_t size);
};

extern const struct kernel_table torchopt_kernels_generic;
#if defined(TORCHOPT_X86)
extern const struct kernel_table torchopt_kernels_avx2, torchopt_kernels_avx512;
#endif

enum dtype { FLOAT64 = 0, FLOAT32 = 1, BFLOAT16 = 2, FLOAT16 = 3 };

/* One kernel over many tensors. */
struct call {
  int64_t kernel;       /* its position in the table; -1: `program` */
  int64_t dtype;        /* of operands that narrow_* mark; the others are float32 if it is half */
  int64_t narrow_in;    /* bit k: input operand k has the dtype of the parameters */
  int64_t narrow_out;   /* bit k: output operand k has */
  int64_t count;        /* tensors */
  int64_t width;        /* numbers of one row */
  int64_t threads;      /* at most; 1 or more */
  const int64_t *sizes; /* entries of each tensor */
  const int64_t *rows;  /* which row of numbers each tensor takes; NULL: row 0 for all */
  const int64_t *in;    /* addresses, operand by operand; 0 reads as zeros */
  const int64_t *out;   /* addresses, operand by operand; what is written to 0 is dropped */
  const double *numbers;
  int64_t done;         /* set to 1 when everything has been written */
  const struct program *program;
  int64_t summed;       /* bit k: of output operand k, at address 0, the sums are wanted */
  double *sums;         /* the sum over each tensor, operand by operand */
};

EXPORT int64_t torchopt_run(struct call *call);
EXPORT int64_t torchopt_find(const char *name);
EXPORT int64_t torchopt_count(void);
/* Position -> name of an operation of programs, the same for every instruction set, or NULL. */
EXPORT const char *torchopt_operation(int64_t position);
EXPORT const char *torchopt_instruction_set(void);
/* Use the OpenMP team whose GOMP_parallel this is; NULL: threads of our own. */
EXPORT void torchopt_use_team(void *function);
EXPORT int64_t torchopt_select(const char *instruction_set);

/* threads.c: how many bytes of all operands make one more thread worth its while. */
int64_t bytes_worth_a_thread(void);

/* Run task(context, k) for k in 0..count-1, each once, on about `wanted` threads and never
 * more than `allowed`; the caller's is one of them. */
typedef void (*task_function)(void *context, int64_t k);
void run_in_parallel(task_function task, void *context, int64_t count, int64_t wanted,
                     int64_t allowed);

#endif

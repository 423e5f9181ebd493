/* One call of the engine: a kernel over many tensors, cut into blocks and spread over threads. */
#include "engine.h"

#include <stddef.h>
#include <stdlib.h>
#include <string.h>

/* Read by the loader before any code runs: what this file was compiled for. */
EXPORT const int64_t torchopt_abi = TORCHOPT_ABI;
EXPORT const char torchopt_compiled_for[] =
#if defined(__AVX512F__)
    "AVX512";
#elif defined(__AVX__)
    "AVX2"; /* torch tells no less apart */
#else
    "DEFAULT";
#endif

/* Best first. */
static const struct kernel_table *const tables[] = {
#if defined(TORCHOPT_X86)
    &torchopt_kernels_avx512,
    &torchopt_kernels_avx2,
#endif
    &torchopt_kernels_generic,
};
#define TABLES (int)(sizeof tables / sizeof tables[0])

/* A run reads it once and stays with what it has read. */
static const struct kernel_table *ATOMIC selected = NULL;

static int supports(const char *instruction_set) {
#if defined(TORCHOPT_X86)
  __builtin_cpu_init();
  if (strcmp(instruction_set, "avx2") == 0)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (strcmp(instruction_set, "avx512") == 0)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("fma");
#endif
  return strcmp(instruction_set, "generic") == 0;
}

/* Use the kernels for an instruction set. Returns 0, or -1 if this machine has it not. */
int64_t torchopt_select(const char *instruction_set) {
  for (int k = 0; k < TABLES; ++k)
    if (strcmp(instruction_set, tables[k]->instruction_set) == 0 && supports(instruction_set)) {
      selected = tables[k];
      return 0;
    }
  return -1;
}

static const struct kernel_table *chosen(void) {
  for (int k = 0; selected == NULL; ++k)
    if (supports(tables[k]->instruction_set)) selected = tables[k];
  return selected;
}

const char *torchopt_instruction_set(void) { return chosen()->instruction_set; }

int64_t torchopt_count(void) { return chosen()->count; }

const char *torchopt_operation(int64_t position) {
  const struct kernel_table *table = chosen();
  return position >= 0 && position < table->operation_count ? table->operations[position].name
                                                            : NULL;
}

/* The position of a kernel, the same for every instruction set, or -1. */
int64_t torchopt_find(const char *name) {
  const struct kernel_table *table = chosen();
  for (int64_t k = 0; k < table->count; ++k)
    if (strcmp(table->kernels[k].name, name) == 0) return k;
  return -1;
}

/* Blocks ------------------------------------------------------------------------------------- */

/* Entries for which operands that are absent, in half precision or misaligned have a stand-in.
 * Small: all stand-ins of a kernel together stay in the first-level cache. */
#define BLOCK 256

union block {
  float of_float[BLOCK];
  double of_double[BLOCK];
};

static const union block zeros; /* zero bytes, whatever the type */

/* Tensors ------------------------------------------------------------------------------------ */

/* A call, its kernel, and how its entries, laid end to end, are cut into shares. */
struct work {
  const struct call *call;
  const struct kernel_table *table;
  const struct kernel *kernel;
  int64_t share;
  double *parts; /* of a call with sums: those of each chunk of each tensor, operand by operand */
};

static void compute(const struct work *work, const void *const *in, void *const *out,
                    const double *numbers, int64_t size) {
  const struct kernel_table *table = work->table;
  int is_double = work->call->dtype == FLOAT64;
  if (work->call->kernel >= 0)
    (is_double ? work->kernel->of_double : work->kernel->of_float)(in, out, numbers, size);
  else
    (is_double ? table->interpret_double : table->interpret_float)(work->call->program, in, out,
                                                                   numbers, size);
}

struct view { /* one tensor of a call */
  const char *in[MAX_STREAMS];
  char *out[MAX_STREAMS];
  const double *numbers;
  int whole; /* all operands are there, aligned, in the type of the arithmetic */
};

/* Bytes of an entry in the type of the arithmetic. */
static int64_t full_size(const struct call *call) { return call->dtype == FLOAT64 ? 8 : 4; }

static int64_t entry_size(const struct call *call, int64_t narrow_operands, int k) {
  int is_half = call->dtype == BFLOAT16 || call->dtype == FLOAT16;
  return is_half && (narrow_operands >> k & 1) ? 2 : full_size(call);
}

static int is_direct(const void *address, int64_t bytes, int64_t full) {
  return address != NULL && bytes == full && (uintptr_t)address % (uintptr_t)full == 0;
}

static struct view look_at(const struct work *work, int64_t t) {
  const struct call *call = work->call;
  int64_t full = full_size(call);
  struct view view;
  view.whole = 1;
  for (int k = 0; k < work->kernel->inputs; ++k) {
    view.in[k] = (const char *)(intptr_t)call->in[k * call->count + t];
    view.whole &= is_direct(view.in[k], entry_size(call, call->narrow_in, k), full);
  }
  for (int k = 0; k < work->kernel->outputs; ++k) {
    view.out[k] = (char *)(intptr_t)call->out[k * call->count + t];
    view.whole &= is_direct(view.out[k], entry_size(call, call->narrow_out, k), full);
  }
  view.numbers = call->numbers;
  if (call->rows != NULL && call->width > 0) view.numbers += call->rows[t] * call->width;
  return view;
}

/* Entries first..last-1 of a whole tensor. */
static void run_whole(const struct work *work, const struct view *view, int64_t first,
                      int64_t last) {
  const void *in[MAX_STREAMS];
  void *out[MAX_STREAMS];
  int64_t bytes = first * full_size(work->call);
  for (int k = 0; k < work->kernel->inputs; ++k) in[k] = view->in[k] + bytes;
  for (int k = 0; k < work->kernel->outputs; ++k) out[k] = view->out[k] + bytes;
  compute(work, in, out, view->numbers, last - first);
}

/* The same for any tensor, block by block, with stand-ins. Outputs that are summed are added to
 * their lanes. */
static void run_blocks(const struct work *work, const struct view *view, int64_t first,
                       int64_t last, double (*lanes)[SUM_LANES]) {
  const struct call *call = work->call;
  const int inputs = work->kernel->inputs, outputs = work->kernel->outputs;
  const int64_t full = full_size(call);
  union block read[MAX_STREAMS], written[MAX_STREAMS];
  const void *in[MAX_STREAMS];
  void *out[MAX_STREAMS];
  for (int64_t at = first; at < last; at += BLOCK) {
    int64_t size = last - at < BLOCK ? last - at : BLOCK;
    for (int k = 0; k < inputs; ++k) {
      int64_t bytes = entry_size(call, call->narrow_in, k);
      const char *from = view->in[k];
      in[k] = from == NULL ? (const void *)&zeros : from + at * bytes;
      if (from == NULL || is_direct(from, bytes, full)) continue;
      if (bytes == 2)
        work->table->widen[call->dtype - BFLOAT16](from + at * 2, read[k].of_float, size);
      else
        memcpy(&read[k], from + at * bytes, (size_t)(size * bytes));
      in[k] = &read[k];
    }
    for (int k = 0; k < outputs; ++k) {
      int64_t bytes = entry_size(call, call->narrow_out, k);
      int direct = is_direct(view->out[k], bytes, full);
      out[k] = direct ? (void *)(view->out[k] + at * bytes) : (void *)&written[k];
    }
    compute(work, in, out, view->numbers, size);
    for (int k = 0; k < outputs; ++k) {
      int64_t bytes = entry_size(call, call->narrow_out, k);
      char *to = view->out[k];
      if (call->summed >> k & 1)
        work->table->add_up[call->dtype != FLOAT64](out[k], lanes[k], size);
      if (to == NULL || is_direct(to, bytes, full)) continue;
      if (bytes == 2)
        work->table->narrow[call->dtype - BFLOAT16](written[k].of_float, to + at * 2, size);
      else
        memcpy(to + at * bytes, &written[k], (size_t)(size * bytes));
    }
  }
}

/* Sums ---------------------------------------------------------------------------------------- */

/* Entries that are summed by one thread, counted from the start of a tensor: so a sum is taken in
 * the same order whatever the number of threads. */
#define CHUNK 4096

static int64_t chunks_in(int64_t entries) { return (entries + CHUNK - 1) / CHUNK; }

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* The chunks that begin among entries first..last-1 of a tensor; parts are those of its chunks. */
static void run_chunks(const struct work *work, const struct view *view, int64_t size,
                       int64_t first, int64_t last, double *parts) {
  const int outputs = work->kernel->outputs;
  for (int64_t c = chunks_in(first); c < chunks_in(last); ++c) {
    double lanes[MAX_STREAMS][SUM_LANES];
    memset(lanes, 0, sizeof lanes);
    run_blocks(work, view, c * CHUNK, least((c + 1) * CHUNK, size), lanes);
    for (int k = 0; k < outputs; ++k) {
      double sum = 0;
      for (int lane = 0; lane < SUM_LANES; ++lane) sum += lanes[k][lane];
      parts[c * outputs + k] = sum;
    }
  }
}

static void collect_sums(const struct work *work) {
  const struct call *call = work->call;
  const int outputs = work->kernel->outputs;
  int operand = 0;
  for (int k = 0; k < outputs; ++k) {
    if (!(call->summed >> k & 1)) continue;
    const double *parts = work->parts + k;
    for (int64_t t = 0; t < call->count; ++t) {
      double sum = 0;
      for (int64_t c = chunks_in(call->sizes[t]); c > 0; --c, parts += outputs) sum += *parts;
      call->sums[operand * call->count + t] = sum;
    }
    ++operand;
  }
}

/* Shares -------------------------------------------------------------------------------------- */

/* One share: a range of the entries of all tensors laid end to end. */
static void run_share(void *context, int64_t share) {
  const struct work *work = context;
  const struct call *call = work->call;
  int64_t begin = share * work->share, end = begin + work->share, start = 0, chunks = 0;
  for (int64_t t = 0; t < call->count && start < end; ++t) {
    int64_t stop = start + call->sizes[t];
    int64_t first = begin > start ? begin - start : 0;
    int64_t last = (end < stop ? end : stop) - start;
    if (first < last) {
      struct view view = look_at(work, t);
      if (work->parts != NULL)
        run_chunks(work, &view, call->sizes[t], first, last,
                   work->parts + chunks * work->kernel->outputs);
      else if (view.whole)
        run_whole(work, &view, first, last);
      else
        run_blocks(work, &view, first, last, NULL);
    }
    start = stop;
    chunks += chunks_in(call->sizes[t]);
  }
}

/* Calls -------------------------------------------------------------------------------------- */

/* Shares of each thread. One that wakes late, or shares its core with another process, takes fewer
 * of them. No more of them: a thread that returns to the entries it had in the last call finds
 * them in its cache. */
#define SHARES 2
/* Shares are multiples of so many entries: no two threads write to one vector. */
#define ALIGNED 1024
/* More entries than any machine holds; what is computed from fewer does not overflow. */
#define MAX_ENTRIES (INT64_MAX >> 12)

/* Whether a place is a block (which the interpreter reads and writes so many entries of). */
static int is_block(const struct program *program, int64_t place) {
  int64_t operands = program->inputs + program->outputs, behind = operands + program->numbers;
  if (place < operands) return place >= 0;
  return place >= behind && place < behind + program->registers;
}

static int is_number(const struct program *program, int64_t place) {
  int64_t operands = program->inputs + program->outputs;
  return place >= operands && place < operands + program->numbers;
}

/* Whether a program stays within its places: anybody may have written it. Results go to outputs and
 * registers. */
static int makes_sense(const struct program *program, const struct kernel_table *table) {
  if (program == NULL || program->inputs < 0 || program->outputs < 0) return 0;
  if (program->inputs > MAX_STREAMS || program->outputs > MAX_STREAMS) return 0;
  if (program->inputs + program->outputs == 0) return 0;
  if (program->numbers < 0 || program->numbers > MAX_NUMBERS) return 0;
  if (program->registers < 0 || program->registers > MAX_REGISTERS) return 0;
  if (program->length < 0 || program->length > MAX_LENGTH) return 0;
  if (program->length > 0 && program->code == NULL) return 0;
  for (int64_t k = 0; k < program->length; ++k) {
    const int32_t *code = program->code + k * INSTRUCTION;
    if (code[0] < 0 || code[0] >= table->operation_count) return 0;
    if (!is_block(program, code[1]) || code[1] < program->inputs) return 0;
    const char *kind = table->operations[code[0]].arguments;
    for (int n = 2; n < INSTRUCTION; ++n) {
      int is_there = *kind != 0, is_entry = is_there && *kind == 'v';
      if (is_entry ? !is_block(program, code[n])
                   : is_there ? !is_number(program, code[n]) : code[n] != 0)
        return 0;
      kind += is_there;
    }
  }
  return 1;
}

/* Returns the entries of all tensors together, or a negative number if a call makes no sense. */
static int64_t count_entries(const struct call *call, const struct kernel_table *table) {
  int64_t total = 0;
  if (call->kernel < -1 || call->kernel >= table->count) return -1;
  if (call->kernel == -1 && !makes_sense(call->program, table)) return -2;
  if (call->kernel == -1 && call->width != 0 && call->width < call->program->numbers) return -2;
  if (call->dtype < FLOAT64 || call->dtype > FLOAT16) return -3;
  if (call->count < 0 || call->count > MAX_ENTRIES) return -3;
  if (call->width < 0 || call->width > MAX_NUMBERS) return -3;
  if (call->count > 0 && (call->sizes == NULL || call->in == NULL || call->out == NULL)) return -4;
  int64_t outputs =
      call->kernel >= 0 ? table->kernels[call->kernel].outputs : call->program->outputs;
  if (call->summed < 0 || call->summed >> outputs != 0) return -7;
  if (call->summed != 0 && call->count > 0 && call->sums == NULL) return -7;
  for (int64_t t = 0; t < call->count; ++t) {
    if (call->sizes[t] < 0 || call->sizes[t] > MAX_ENTRIES - total) return -5;
    total += call->sizes[t];
    /* there are never more rows than tensors */
    if (call->rows != NULL && (call->rows[t] < 0 || call->rows[t] >= call->count)) return -6;
  }
  return total;
}

/* Run one kernel over many tensors. Returns 0, or a negative number for a call that makes no
 * sense or finds no memory for its sums; nothing has been written then. */
int64_t torchopt_run(struct call *call) {
  const struct kernel_table *table = chosen();
  call->done = 0;
  int64_t total = count_entries(call, table);
  if (total < 0) return total;
  struct kernel kernel = {NULL, 0, 0, NULL, NULL};
  if (call->kernel >= 0)
    kernel = table->kernels[call->kernel];
  else
    kernel.inputs = (int)call->program->inputs, kernel.outputs = (int)call->program->outputs;
  struct work work = {call, table, &kernel, total, NULL};
  if (call->summed != 0) {
    int64_t chunks = 0;
    for (int64_t t = 0; t < call->count; ++t) chunks += chunks_in(call->sizes[t]);
    work.parts = malloc((size_t)((chunks + 1) * kernel.outputs) * sizeof(double));
    if (work.parts == NULL) return -8;
  }
  int64_t bytes = total * full_size(call) * (kernel.inputs + kernel.outputs);
  int64_t threads = bytes / bytes_worth_a_thread();
  if (threads > call->threads) threads = call->threads;
  if (threads <= 1) {
    run_share(&work, 0);
  } else {
    work.share = (total / (threads * SHARES) / ALIGNED + 1) * ALIGNED;
    int64_t shares = (total + work.share - 1) / work.share;
    run_in_parallel(run_share, &work, shares, threads, call->threads);
  }
  if (work.parts != NULL) {
    collect_sums(&work);
    free(work.parts);
  }
  call->done = 1;
  return 0;
}

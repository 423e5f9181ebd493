/* Threads. This library links no OpenMP: torch brings its own, and two runtimes in one process fight.
 * On Linux the loader hands over the entry of the very runtime that torch has loaded, so that both
 * share one team of threads: those of a second pool would compete with torch's, which go on
 * spinning for a while after each of its operations. Elsewhere, and after fork (which no OpenMP
 * team survives), there is a small pool of our own.
 *
 * One call at a time has the pool; a call that finds it taken (another Python thread) runs on its
 * own thread alone. After fork the child has no workers and starts its own when it needs them.
 */
#include "engine.h"

#if defined(_WIN32)

void torchopt_use_team(void *function) { (void)function; }

void run_in_parallel(void (*task)(void *, int64_t), void *context, int64_t count) {
  for (int64_t k = 0; k < count; ++k) task(context, k);
}

#else

#include <pthread.h>
#include <signal.h>

#define MAX_WORKERS 255

static pthread_mutex_t owner = PTHREAD_MUTEX_INITIALIZER; /* held by the call that has the pool */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;  /* guards all below */
static pthread_cond_t work_came = PTHREAD_COND_INITIALIZER;
static pthread_cond_t work_done = PTHREAD_COND_INITIALIZER;
static int workers = 0;
static void (*current_task)(void *, int64_t);
static void *current_context;
static int64_t next_share, shares, unfinished;

/* Take shares until none is left; called and left with the lock held. */
static void take_shares(void) {
  while (next_share < shares) {
    int64_t share = next_share++;
    void (*task)(void *, int64_t) = current_task;
    void *context = current_context;
    pthread_mutex_unlock(&lock);
    task(context, share);
    pthread_mutex_lock(&lock);
    if (--unfinished == 0) pthread_cond_signal(&work_done);
  }
}

static void *work(void *unused) {
  (void)unused;
  pthread_mutex_lock(&lock);
  for (;;) {
    take_shares();
    pthread_cond_wait(&work_came, &lock);
  }
  return NULL;
}

/* GOMP_parallel of the OpenMP runtime that torch uses, or NULL. */
typedef void (*team_function)(void (*task)(void *), void *context, unsigned threads,
                              unsigned flags);
static team_function team = NULL;

struct team_work {
  void (*task)(void *, int64_t);
  void *context;
  int64_t count, next;
};

static void take_team_shares(void *context) {
  struct team_work *work = context;
  for (;;) {
    int64_t share = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED);
    if (share >= work->count) return;
    work->task(work->context, share);
  }
}

static void before_fork(void) {
  pthread_mutex_lock(&owner);
  pthread_mutex_lock(&lock);
}

static void after_fork_in_parent(void) {
  pthread_mutex_unlock(&lock);
  pthread_mutex_unlock(&owner);
}

static void after_fork_in_child(void) {
  workers = 0; /* threads do not survive fork, and a team of OpenMP would wait for them */
  team = NULL;
  next_share = shares = unfinished = 0;
  pthread_cond_init(&work_came, NULL);
  pthread_cond_init(&work_done, NULL);
  pthread_mutex_unlock(&lock);
  pthread_mutex_unlock(&owner);
}

static void watch_fork(void) {
  pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
}

static pthread_once_t watching = PTHREAD_ONCE_INIT;

void torchopt_use_team(void *function) {
  pthread_once(&watching, watch_fork);
  team = (team_function)function;
}

/* Called with the lock held. Signals stay with the threads of Python. */
static void start_workers(int64_t wanted) {
  sigset_t all, before;
  pthread_once(&watching, watch_fork);
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  while (workers < wanted && workers < MAX_WORKERS) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, work, NULL) != 0) break; /* fewer threads, same result */
    pthread_detach(thread);
    ++workers;
  }
  pthread_sigmask(SIG_SETMASK, &before, NULL);
}

void run_in_parallel(void (*task)(void *, int64_t), void *context, int64_t count) {
  if (team != NULL) {
    struct team_work work = {task, context, count, 0};
    team(take_team_shares, &work, (unsigned)count, 0);
    return;
  }
  if (pthread_mutex_trylock(&owner) != 0) {
    for (int64_t k = 0; k < count; ++k) task(context, k);
    return;
  }
  pthread_mutex_lock(&lock);
  start_workers(count - 1);
  current_task = task;
  current_context = context;
  next_share = 0;
  shares = unfinished = count;
  pthread_cond_broadcast(&work_came);
  take_shares();
  while (unfinished > 0) pthread_cond_wait(&work_done, &lock);
  pthread_mutex_unlock(&lock);
  pthread_mutex_unlock(&owner);
}

#endif

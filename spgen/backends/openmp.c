/* Runs the workers of a compiled kernel on OpenMP threads.

   Linked without an OpenMP library of its own, so that it finds the one PyTorch has loaded: one pool of threads serves
   PyTorch's operators and the kernels, and torch.set_num_threads holds for both. */
#include <stdint.h>
#ifdef _OPENMP
#include <omp.h>
#endif

typedef struct {
  void *sync;
  int32_t workers;
} Environment;
typedef int (*Worker)(int index, Environment *environment, void *closure);

/* In a child of fork() the threads of its parent's pool are gone, and GNU's OpenMP would wait for them for ever. */
static int alone = 0;
void spgen_run_alone(void) { alone = 1; }

/* The contract of TVMBackendParallelLaunch: call worker(0 .. n-1); `workers` 0 asks for as many as there are. */
int spgen_parallel_launch(Worker worker, void *closure, int workers) {
  int error = 0;
#ifdef _OPENMP
  int n = workers > 0 ? workers : omp_get_max_threads();
  if (n > 1 && !alone) {
#pragma omp parallel num_threads(n)
    {
      Environment environment = {0, omp_get_num_threads()};
      int result = worker(omp_get_thread_num(), &environment, closure);
      if (result != 0) {
#pragma omp atomic write
        error = result;
      }
    }
    return error;
  }
#endif
  Environment environment = {0, 1};
  error = worker(0, &environment, closure);
  return error;
}

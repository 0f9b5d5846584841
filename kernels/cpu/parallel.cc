#include "kernels/cpu/parallel.h"

#include <sched.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <string>

namespace headstart {
namespace {

// CPUs' worth of time per period, or 0 when there is no limit.
double CgroupQuota() {
  std::ifstream v2("/sys/fs/cgroup/cpu.max");
  std::string quota;
  double period = 0;
  if (v2 >> quota >> period) {
    return quota == "max" || period <= 0 ? 0 : std::atof(quota.c_str()) / period;
  }
  std::ifstream v1_quota("/sys/fs/cgroup/cpu/cpu.cfs_quota_us");
  std::ifstream v1_period("/sys/fs/cgroup/cpu/cpu.cfs_period_us");
  double quota_us = 0;
  if (v1_quota >> quota_us && v1_period >> period && quota_us > 0 && period > 0) {
    return quota_us / period;
  }
  return 0;
}

}  // namespace

int32_t UsableCpus() {
  cpu_set_t mask;
  const int32_t cpus =
      sched_getaffinity(0, sizeof(mask), &mask) == 0 ? CPU_COUNT(&mask) : omp_get_num_procs();
  const double quota = CgroupQuota();
  if (quota <= 0) return std::max(cpus, 1);
  return std::clamp(static_cast<int32_t>(quota), 1, std::max(cpus, 1));
}

}  // namespace headstart

// How threads of the CPU backend wait for each other.
#pragma once

#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <string>
#include <system_error>
#include <vector>

namespace headstart {

// About 10 us: longer than from one operation to the next, much shorter than a turn on a CPU.
inline constexpr char kIdleSpins[] = "GOMP_SPINCOUNT=1000";

// To be called first in main. Threads of OpenMP that wait for others spin for milliseconds before
// they sleep. Where other processes want the CPUs they take from each other the time in which the
// one that they wait for could run, and two threads are slower than one. libgomp reads how long
// once, before main, so the program starts again in its process, with kIdleSpins in its
// environment. Returns where the environment says already how to wait (GOMP_SPINCOUNT,
// OMP_WAIT_POLICY), and where the program can't be started again: it is right without, but slower
// beside others.
inline void LimitIdleSpinning(char** argv) {
  if (std::getenv("GOMP_SPINCOUNT") != nullptr || std::getenv("OMP_WAIT_POLICY") != nullptr) return;
  std::error_code unknown;
  const std::string program = std::filesystem::read_symlink("/proc/self/exe", unknown).string();
  if (unknown) return;
  std::string spins = kIdleSpins;
  std::vector<char*> environment;
  for (char** variable = environ; *variable != nullptr; ++variable) {
    environment.push_back(*variable);
  }
  environment.push_back(spins.data());
  environment.push_back(nullptr);
  execve(program.c_str(), argv, environment.data());
}

}  // namespace headstart

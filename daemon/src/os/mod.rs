//! The kernel: cgroups, processes, signals. With the plugin ABI the only home of `unsafe`.

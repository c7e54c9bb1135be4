//! Settings of the memory allocator: few arenas, and freed memory returned to the kernel.

/// Blocks of at least this many bytes are mapped separately, and so unmapped when they are freed.
#[cfg(target_env = "gnu")]
const MAPPED_BYTES: libc::c_int = 128 << 10;

/// Makes all threads share a few allocator arenas. Must be called before the first thread is started.
///
/// glibc creates up to eight arenas per processor, and memory freed in one arena is not reused by another: thirty
/// threads that take turns at the same work retain thirty times its memory. glibc also raises the size from which
/// blocks are mapped separately whenever a larger one is freed (mallopt(3)); setting that size fixes it.
pub fn share_arenas() {
    #[cfg(target_env = "gnu")]
    {
        let processors = std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get);
        let arenas = libc::c_int::try_from(processors.max(2)).unwrap_or(libc::c_int::MAX);
        // SAFETY: mallopt(3) takes no pointer, and no other thread has been started.
        unsafe {
            libc::mallopt(libc::M_ARENA_MAX, arenas);
            libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED_BYTES);
        }
    }
}

/// Returns freed memory to the kernel.
///
/// The allocator retains what a scan of a large workspace has freed, in one arena per participating thread: hundreds of
/// megabytes of unused memory.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim(3) takes no pointer and is thread-safe; it only releases free pages.
    unsafe {
        libc::malloc_trim(0);
    }
}

//! Fork and exec for a process with a single thread.
//!
//! Unlike `std::process`, this joins a control group, sets limits and resets all signals between fork and exec, and
//! reports which of these has failed. All memory is allocated before the fork; between fork and exec only system calls
//! are made.

use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;

use nix::errno::Errno;
use nix::unistd::{ForkResult, Pid, chdir, getpid, tcsetpgrp};

use super::limits::{self, Limit};
use super::prelude::{self, Prelude};
use super::signals;
use super::spawn_error::{SpawnError, SpawnStage};

/// A program to be started. `argv[0]` without a slash is searched for in the PATH of `env`, which is the agent's PATH
/// and not that of this process.
#[derive(Debug)]
pub struct Program {
    argv: Vec<CString>,
    env: Vec<CString>,
    candidates: Vec<CString>,
    cwd: CString,
    umask: u32,
    limits: Vec<Limit>,
    foreground: bool,
}

impl Program {
    /// Prepares a program.
    ///
    /// # Errors
    /// If a string contains a NUL or `argv` is empty.
    pub fn new(
        argv: &[impl AsRef<OsStr>],
        env: &[(impl AsRef<OsStr>, impl AsRef<OsStr>)],
        cwd: &OsStr,
        umask: u32,
        limits: &[Limit],
    ) -> io::Result<Self> {
        let c_string = |bytes: &[u8]| CString::new(bytes).map_err(io::Error::from);
        let name = argv
            .first()
            .map(|name| name.as_ref().as_bytes())
            .filter(|name| !name.is_empty())
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "the command is empty"))?;
        let path = env
            .iter()
            .find(|(key, _)| key.as_ref() == "PATH")
            .map_or(&b"/usr/local/bin:/usr/bin:/bin"[..], |(_, value)| value.as_ref().as_bytes());
        let candidates = if name.contains(&b'/') {
            vec![c_string(name)?]
        } else {
            // An empty entry means the working directory, as in every shell.
            path.split(|&b| b == b':')
                .map(|dir| {
                    let dir = if dir.is_empty() { b"." } else { dir };
                    c_string(&[dir, b"/", name].concat())
                })
                .collect::<io::Result<_>>()?
        };
        Ok(Self {
            argv: argv.iter().map(|arg| c_string(arg.as_ref().as_bytes())).collect::<io::Result<_>>()?,
            env: env
                .iter()
                .map(|(key, value)| c_string(&[key.as_ref().as_bytes(), b"=", value.as_ref().as_bytes()].concat()))
                .collect::<io::Result<_>>()?,
            candidates,
            cwd: c_string(cwd.as_bytes())?,
            umask,
            limits: limits.to_vec(),
            foreground: false,
        })
    }

    /// Makes the program the foreground process group of its stdin, which must be the controlling terminal of the
    /// caller's session.
    #[must_use]
    pub fn in_foreground(mut self) -> Self {
        self.foreground = true;
        self
    }

    /// Starts the program in a process group of its own and in the caller's session, with the given standard streams.
    /// Returns once the program executes. If another program runs before it in the same process, returns once that one
    /// is about to begin (see `prelude`).
    ///
    /// The caller must have a single thread. A child that has failed before its exec has been reaped.
    pub fn spawn(
        &self,
        stdin: BorrowedFd<'_>,
        stdout: BorrowedFd<'_>,
        stderr: BorrowedFd<'_>,
        cgroup_procs: Option<&File>,
        before: Option<&Program>,
    ) -> Result<(Pid, Option<Prelude>), SpawnError> {
        let (report_in, report_out) =
            UnixStream::pair().map_err(|source| SpawnError { stage: SpawnStage::Fork, source })?;
        let stdio = [stdin.as_raw_fd(), stdout.as_raw_fd(), stderr.as_raw_fd()];
        let before = before.map(|program| (program, program.strings_for_shell()));
        let before = before.as_ref().map(|(program, shell)| (*program, program.prepared(shell, stdio)));
        let shell_argvs = self.strings_for_shell();
        let prepared = self.prepared(&shell_argvs, stdio);
        match fork_single_threaded().map_err(|source| SpawnError { stage: SpawnStage::Fork, source })? {
            ForkResult::Child => {
                // The child must see the end of file when the parent dies.
                drop(report_in);
                let prepared_child = self.prepare(&prepared, cgroup_procs).and_then(|()| match &before {
                    Some((program, its)) => prelude::play(&report_out, || program.exec(its)),
                    None => Ok(()),
                });
                let (stage, errno) = match prepared_child {
                    Ok(()) => (SpawnStage::Exec, self.exec(&prepared)),
                    Err(failure) => failure,
                };
                prelude::say(&report_out, stage as u8, errno as i32);
                // SAFETY: _exit ends the process without running any exit handler of the parent.
                unsafe { libc::_exit(127) }
            }
            ForkResult::Parent { child } => {
                drop(report_out);
                self.await_exec(child, report_in)
            }
        }
    }

    fn await_exec(&self, child: Pid, mut report: UnixStream) -> Result<(Pid, Option<Prelude>), SpawnError> {
        let failed = |error| {
            // The child is about to exit; the wait can only be interrupted.
            while nix::sys::wait::waitpid(child, None) == Err(Errno::EINTR) {}
            Err(error)
        };
        match prelude::listen(&mut report) {
            Ok(None) => Ok((child, None)),
            Ok(Some(message)) if message.begins() => match Prelude::new(report) {
                Ok(prelude) => Ok((child, Some(prelude))),
                Err(source) => failed(SpawnError { stage: SpawnStage::Fork, source }),
            },
            Ok(Some(message)) => failed(message.into_error()),
            Err(source) => failed(SpawnError { stage: SpawnStage::Fork, source }),
        }
    }

    /// The arguments of a shell for scripts without `#!`, which it runs as execvp(3) does.
    fn strings_for_shell(&self) -> Vec<Vec<CString>> {
        let words = |file: &CString| {
            let mut argv = vec![c"/bin/sh".to_owned(), file.clone()];
            argv.extend(self.argv.iter().skip(1).cloned());
            argv
        };
        self.candidates.iter().map(words).collect()
    }

    fn prepared(&self, shell_argvs: &[Vec<CString>], stdio: [i32; 3]) -> PreparedExec {
        let pointers = |strings: &[CString]| -> Vec<*const libc::c_char> {
            strings.iter().map(|s| s.as_ptr()).chain([std::ptr::null()]).collect()
        };
        PreparedExec {
            argv: pointers(&self.argv),
            env: pointers(&self.env),
            shell_argvs: shell_argvs.iter().map(|argv| pointers(argv)).collect(),
            stdio,
        }
    }

    /// In the child: does everything before the exec.
    fn prepare(&self, prepared: &PreparedExec, cgroup_procs: Option<&File>) -> Result<(), (SpawnStage, Errno)> {
        if let Some(procs) = cgroup_procs
            && let Err(errno) = nix::unistd::write(procs, b"0")
        {
            return Err((SpawnStage::Cgroup, errno));
        }
        if let Err(errno) = nix::unistd::setpgid(Pid::from_raw(0), Pid::from_raw(0)) {
            return Err((SpawnStage::ProcessGroup, errno));
        }
        // SAFETY: stdin is open during the call.
        let stdin = unsafe { BorrowedFd::borrow_raw(prepared.stdio[0]) };
        // tcsetpgrp by a background process raises SIGTTOU, which stops the process unless it is ignored. The caller
        // ignores it, so this comes before the signals are reset.
        if self.foreground
            && let Err(errno) = tcsetpgrp(stdin, getpid())
        {
            return Err((SpawnStage::Terminal, errno));
        }
        signals::reset_all();
        // SAFETY: umask only sets a number and cannot fail.
        unsafe { libc::umask(self.umask & 0o777) };
        for limit in &self.limits {
            if let Err(errno) = limits::set_up_to_hard(limit) {
                return Err((SpawnStage::Limits, errno));
            }
        }
        if let Err(errno) = chdir(self.cwd.as_c_str()) {
            return Err((SpawnStage::WorkingDirectory, errno));
        }
        for (target, &source) in prepared.stdio.iter().enumerate() {
            // SAFETY: the source is open during the call; the targets 0 to 2 may be replaced.
            if unsafe { libc::dup2(source, target as i32) } < 0 {
                return Err((SpawnStage::Stdio, Errno::last()));
            }
        }
        // SAFETY: marks descriptors and accesses no memory. Kernels before 5.11 refuse; there the descriptors of this
        // program are close-on-exec already, and inherited ones were closed at the start.
        unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
        Ok(())
    }

    /// Tries the candidates in order, as execvp(3) does.
    fn exec(&self, prepared: &PreparedExec) -> Errno {
        let mut last = Errno::ENOENT;
        for (file, shell_argv) in self.candidates.iter().zip(&prepared.shell_argvs) {
            // SAFETY: file, argv and env are NUL-terminated strings in null-terminated arrays owned by `self` and
            // `prepared`.
            unsafe { libc::execve(file.as_ptr(), prepared.argv.as_ptr(), prepared.env.as_ptr()) };
            #[expect(clippy::wildcard_enum_match_arm, reason = "every other errno ends the search")]
            match Errno::last() {
                Errno::ENOEXEC => {
                    // SAFETY: as above.
                    unsafe {
                        libc::execve(shell_argv[0], shell_argv.as_ptr(), prepared.env.as_ptr());
                    }
                    return Errno::ENOEXEC;
                }
                Errno::ENOENT | Errno::ENOTDIR => {}
                // A later candidate may be executable; if none is, this is the more specific error.
                Errno::EACCES => last = Errno::EACCES,
                errno => return errno,
            }
        }
        last
    }
}

/// Pointers into a [`Program`], created before the fork because the child must not allocate.
struct PreparedExec {
    argv: Vec<*const libc::c_char>,
    env: Vec<*const libc::c_char>,
    shell_argvs: Vec<Vec<*const libc::c_char>>,
    stdio: [i32; 3],
}

/// Forks this process, which must have a single thread. The child may then do anything that the parent may do.
///
/// # Errors
/// If this process has several threads, or the fork fails.
pub fn fork_single_threaded() -> io::Result<ForkResult> {
    let threads = std::fs::read_dir("/proc/self/task")?.count();
    if threads != 1 {
        return Err(io::Error::other(format!("forking requires a single thread, and this process has {threads}")));
    }
    // SAFETY: with a single thread no lock can be held by a thread that the child lacks.
    Ok(unsafe { nix::unistd::fork() }?)
}

/// Closes every descriptor from 3 on. Only for the very start of a program, before it owns any.
pub fn close_inherited() {
    // SAFETY: called first in `main`, when no Rust value owns a descriptor above 2. A kernel without close_range leaves
    // them open, which wastes descriptors and breaks nothing.
    unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, 0) };
}

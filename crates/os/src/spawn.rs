//! Fork and exec, for a process that has one thread.
//!
//! `std::process` cannot join a control group, set limits and reset all signals between fork and
//! exec and say which of these failed: this can. Everything that needs memory is prepared before
//! the fork; between fork and exec only system calls are made.

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

/// What happened when the child prepared itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Stage {
    /// Fork, pipe or another preparation in the parent.
    Fork = 1,
    /// Joining the control group.
    Cgroup = 2,
    /// Making a process group of its own.
    ProcessGroup = 3,
    /// Setting a resource limit.
    Limits = 4,
    /// Entering the working directory.
    WorkingDirectory = 5,
    /// Connecting the standard streams.
    Stdio = 6,
    /// Executing the program.
    Exec = 7,
    /// Executing the program that runs before it.
    ExecBefore = 8,
    /// Becoming the foreground of the terminal.
    Terminal = 9,
}

impl Stage {
    pub(super) fn from_byte(byte: u8) -> Self {
        match byte {
            2 => Self::Cgroup,
            3 => Self::ProcessGroup,
            4 => Self::Limits,
            5 => Self::WorkingDirectory,
            6 => Self::Stdio,
            7 => Self::Exec,
            8 => Self::ExecBefore,
            9 => Self::Terminal,
            _ => Self::Fork,
        }
    }

    fn verb(self) -> &'static str {
        match self {
            Self::Fork => "fork",
            Self::Cgroup => "join the control group",
            Self::ProcessGroup => "make a process group",
            Self::Limits => "set a resource limit",
            Self::WorkingDirectory => "enter the working directory",
            Self::Stdio => "connect the standard streams",
            Self::Exec => "execute the program",
            Self::ExecBefore => "execute the program that runs before it",
            Self::Terminal => "become the foreground of the terminal",
        }
    }
}

/// Why no program runs.
#[derive(Debug, thiserror::Error)]
#[error("{}", stage.verb())]
pub struct SpawnError {
    /// How far it came.
    pub stage: Stage,
    /// The cause.
    #[source]
    pub source: io::Error,
}

/// A program to be started. `argv[0]` without a slash is looked up in the PATH of `env`, which is
/// the agent's and not this process's.
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
    /// Prepares a program; fails when a string holds a NUL or `argv` is empty.
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
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "no program is named"))?;
        let path = env
            .iter()
            .find(|(key, _)| key.as_ref() == "PATH")
            .map_or(&b"/usr/local/bin:/usr/bin:/bin"[..], |(_, value)| value.as_ref().as_bytes());
        let candidates = if name.contains(&b'/') {
            vec![c_string(name)?]
        } else {
            // An empty part means the working directory, as in every shell.
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

    /// Makes the program the foreground of its stdin, which is then the controlling terminal of the
    /// caller's session.
    #[must_use]
    pub fn in_foreground(mut self) -> Self {
        self.foreground = true;
        self
    }

    /// Starts the program in a process group of its own and the caller's session, with the given
    /// stdout and stderr, and stdin from nowhere. Returns once it executes; or, where another
    /// program runs first in its place, once that is to begin (see `prelude.rs`).
    ///
    /// The caller must have one thread. A child that did not come to its exec has been reaped.
    pub fn spawn(
        &self,
        stdin: BorrowedFd<'_>,
        stdout: BorrowedFd<'_>,
        stderr: BorrowedFd<'_>,
        cgroup_procs: Option<&File>,
        before: Option<&Program>,
    ) -> Result<(Pid, Option<Prelude>), SpawnError> {
        let (report_in, report_out) = UnixStream::pair().map_err(|source| SpawnError { stage: Stage::Fork, source })?;
        let stdio = [stdin.as_raw_fd(), stdout.as_raw_fd(), stderr.as_raw_fd()];
        let before = before.map(|program| (program, program.strings_for_shell()));
        let before = before.as_ref().map(|(program, shell)| (*program, program.prepared(shell, stdio)));
        let shell_argvs = self.strings_for_shell();
        let prepared = self.prepared(&shell_argvs, stdio);
        match fork_single_threaded().map_err(|source| SpawnError { stage: Stage::Fork, source })? {
            ForkResult::Child => {
                // The child must see when the parent is gone.
                drop(report_in);
                let prepared_well = self.prepare(&prepared, cgroup_procs).and_then(|()| match &before {
                    Some((program, its)) => prelude::play(&report_out, || program.exec(its)),
                    None => Ok(()),
                });
                let (stage, errno) = match prepared_well {
                    Ok(()) => (Stage::Exec, self.exec(&prepared)),
                    Err(failure) => failure,
                };
                prelude::say(&report_out, stage as u8, errno as i32);
                // SAFETY: _exit ends the process without running anything of the parent's.
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
            // It is about to end; only an interruption can come between.
            while nix::sys::wait::waitpid(child, None) == Err(Errno::EINTR) {}
            Err(error)
        };
        match prelude::listen(&mut report) {
            Ok(None) => Ok((child, None)),
            Ok(Some(message)) if message.begins() => match Prelude::new(report) {
                Ok(prelude) => Ok((child, Some(prelude))),
                Err(source) => failed(SpawnError { stage: Stage::Fork, source }),
            },
            Ok(Some(message)) => failed(message.into_error()),
            Err(source) => failed(SpawnError { stage: Stage::Fork, source }),
        }
    }

    /// Scripts without `#!` are run by the shell, as execvp(3) does.
    fn strings_for_shell(&self) -> Vec<Vec<CString>> {
        let words = |file: &CString| {
            let mut argv = vec![c"/bin/sh".to_owned(), file.clone()];
            argv.extend(self.argv.iter().skip(1).cloned());
            argv
        };
        self.candidates.iter().map(words).collect()
    }

    fn prepared(&self, shell_argvs: &[Vec<CString>], stdio: [i32; 3]) -> Prepared {
        let pointers = |strings: &[CString]| -> Vec<*const libc::c_char> {
            strings.iter().map(|s| s.as_ptr()).chain([std::ptr::null()]).collect()
        };
        Prepared {
            argv: pointers(&self.argv),
            env: pointers(&self.env),
            shell_argvs: shell_argvs.iter().map(|argv| pointers(argv)).collect(),
            stdio,
        }
    }

    /// Runs in the child: everything up to the exec.
    fn prepare(&self, prepared: &Prepared, cgroup_procs: Option<&File>) -> Result<(), (Stage, Errno)> {
        if let Some(procs) = cgroup_procs
            && let Err(errno) = nix::unistd::write(procs, b"0")
        {
            return Err((Stage::Cgroup, errno));
        }
        if let Err(errno) = nix::unistd::setpgid(Pid::from_raw(0), Pid::from_raw(0)) {
            return Err((Stage::ProcessGroup, errno));
        }
        // SAFETY: stdin is open for the whole call.
        let stdin = unsafe { BorrowedFd::borrow_raw(prepared.stdio[0]) };
        // A process of the background that does this is stopped by SIGTTOU unless it ignores that
        // signal, as the caller does: hence before the signals are reset.
        if self.foreground
            && let Err(errno) = tcsetpgrp(stdin, getpid())
        {
            return Err((Stage::Terminal, errno));
        }
        signals::reset_all();
        // SAFETY: umask only sets a number and cannot fail.
        unsafe { libc::umask(self.umask & 0o777) };
        for limit in &self.limits {
            if let Err(errno) = limits::set_up_to_hard(limit) {
                return Err((Stage::Limits, errno));
            }
        }
        if let Err(errno) = chdir(self.cwd.as_c_str()) {
            return Err((Stage::WorkingDirectory, errno));
        }
        for (target, &source) in prepared.stdio.iter().enumerate() {
            // SAFETY: the source is open for the whole call; the targets 0 to 2 are ours to replace.
            if unsafe { libc::dup2(source, target as i32) } < 0 {
                return Err((Stage::Stdio, Errno::last()));
            }
        }
        // SAFETY: marks descriptors, touches no memory. Kernels before 5.11 refuse; there all of
        // ours are close-on-exec already, and the inherited ones were closed at the start.
        unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
        Ok(())
    }

    /// Tries the candidates in order, as execvp(3) does.
    fn exec(&self, prepared: &Prepared) -> Errno {
        let mut last = Errno::ENOENT;
        for (file, shell_argv) in self.candidates.iter().zip(&prepared.shell_argvs) {
            // SAFETY: file, argv and env are NUL-terminated strings in null-terminated arrays that
            // live in `self` and `prepared`.
            unsafe { libc::execve(file.as_ptr(), prepared.argv.as_ptr(), prepared.env.as_ptr()) };
            match Errno::last() {
                Errno::ENOEXEC => {
                    // SAFETY: as above.
                    unsafe {
                        libc::execve(shell_argv[0], shell_argv.as_ptr(), prepared.env.as_ptr());
                    }
                    return Errno::ENOEXEC;
                }
                Errno::ENOENT | Errno::ENOTDIR => {}
                // A later candidate may be allowed; if none is, this is the better answer.
                Errno::EACCES => last = Errno::EACCES,
                errno => return errno,
            }
        }
        last
    }
}

/// Pointers into a [`Program`], made before the fork so that the child need not allocate.
struct Prepared {
    argv: Vec<*const libc::c_char>,
    env: Vec<*const libc::c_char>,
    shell_argvs: Vec<Vec<*const libc::c_char>>,
    stdio: [i32; 3],
}

/// Forks this process, which must have one thread: the child may then do anything.
pub fn fork_single_threaded() -> io::Result<ForkResult> {
    let threads = std::fs::read_dir("/proc/self/task")?.count();
    if threads != 1 {
        return Err(io::Error::other(format!("this process has {threads} threads, forking needs one")));
    }
    // SAFETY: with a single thread no lock can be held by a thread that the child lacks.
    Ok(unsafe { nix::unistd::fork() }?)
}

/// Closes every descriptor from 3 on. Only for the very start of a program, before it owns any.
pub fn close_inherited() {
    // SAFETY: called first in `main`, when no Rust value owns a descriptor above 2. A kernel
    // without close_range leaves them open, which wastes descriptors and breaks nothing.
    unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, 0) };
}

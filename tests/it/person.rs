//! `fermatactl` at a terminal: a PTY of the test, with the output on it and the text that is typed.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::process::{Child, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use fermata_tests::Sandbox;
use fermata_tests::waiting::{SOON, wait_until};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::pty::{Winsize, openpty};
use nix::sys::signal::{Signal, kill};
use nix::sys::termios::{LocalFlags, tcgetattr};
use nix::unistd::Pid;

/// One `fermatactl` at a terminal of 30 x 100.
pub struct Person {
    child: Child,
    master: File,
    slave: OwnedFd,
    output: Arc<Mutex<Vec<u8>>>,
}

impl Person {
    /// Runs `fermatactl` with these arguments at a new terminal.
    #[track_caller]
    pub fn runs(sandbox: &Sandbox, args: &[&str]) -> Self {
        let size = Winsize { ws_row: 30, ws_col: 100, ws_xpixel: 0, ws_ypixel: 0 };
        let pair = openpty(&size, None).expect("open a terminal");
        // Tests run in parallel: processes that other tests start must not inherit this terminal.
        for end in [&pair.master, &pair.slave] {
            fcntl(end, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).expect("keep a descriptor to itself");
        }
        let end = || Stdio::from(pair.slave.try_clone().expect("duplicate a descriptor"));
        let mut command = sandbox.ctl_command(args);
        command.stdin(end()).stdout(end()).stderr(end()).env("TERM", "xterm-256color");
        let child = command.spawn().expect("start fermatactl");
        drop(command);
        let master = File::from(pair.master);
        let output = Arc::new(Mutex::new(Vec::new()));
        let (mut reader, sink) = (master.try_clone().expect("duplicate a descriptor"), Arc::clone(&output));
        // Ends with the last descriptor of the slave.
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = reader.read(&mut bytes) {
                sink.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(&bytes[..count]);
            }
        });
        Self { child, master, slave: pair.slave, output }
    }

    /// Returns the output so far that [`Self::sees`] has not consumed.
    pub fn shown(&self) -> String {
        String::from_utf8_lossy(&self.output.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
    }

    /// Waits until a text is shown; returns the output before it and consumes both.
    #[track_caller]
    pub fn sees(&self, text: &str) -> String {
        let mut found = String::new();
        wait_until(SOON, &format!("{text:?} to be shown; there is {:?}", tail(&self.shown())), || {
            let mut output = self.output.lock().unwrap_or_else(PoisonError::into_inner);
            let at = output.windows(text.len()).position(|window| window == text.as_bytes());
            if let Some(at) = at {
                found = String::from_utf8_lossy(&output[..at]).into_owned();
                output.drain(..at + text.len());
            }
            at.is_some()
        });
        found
    }

    pub fn types(&self, text: &str) {
        (&self.master).write_all(text.as_bytes()).expect("type");
    }

    /// Resizes the terminal.
    pub fn resizes(&self, rows: u16, cols: u16) {
        // Without ioctl in this crate, stty sets the size.
        let status = std::process::Command::new("stty")
            .args(["rows", &rows.to_string(), "cols", &cols.to_string()])
            .stdin(Stdio::from(self.slave.try_clone().expect("duplicate a descriptor")))
            .status()
            .expect("run stty");
        assert!(status.success());
        self.signals(Signal::SIGWINCH);
    }

    /// Sends a signal to `fermatactl`.
    pub fn signals(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).expect("a process id fits into 31 bits");
        kill(Pid::from_raw(pid), signal).expect("signal fermatactl");
    }

    /// Waits until `fermatactl` has ended.
    #[track_caller]
    pub fn ends(&mut self) -> ExitStatus {
        let mut ended = None;
        let child = &mut self.child;
        wait_until(SOON, "fermatactl to end", || {
            ended = child.try_wait().expect("ask for the exit status");
            ended.is_some()
        });
        assert!(!self.is_raw(), "the terminal was left in raw mode");
        let ended = ended.expect("the wait ended with a status");
        assert!(ended.code().is_some(), "fermatactl was killed: {ended}");
        ended
    }

    /// Says whether the terminal is in raw mode.
    pub fn is_raw(&self) -> bool {
        let attributes = tcgetattr(&self.slave).expect("ask the terminal");
        !attributes.local_flags.contains(LocalFlags::ICANON)
    }
}

impl Drop for Person {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- the terminal showed ---\n{:?}", tail(&self.shown()));
        }
        // It may have ended already.
        if self.child.kill().is_ok() {
            self.child.wait().expect("wait for fermatactl");
        }
    }
}

fn tail(text: &str) -> &str {
    let start = text.len().saturating_sub(2000);
    let start = (start..text.len()).find(|&at| text.is_char_boundary(at)).unwrap_or(start);
    &text[start..]
}

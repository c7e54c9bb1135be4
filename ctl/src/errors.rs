//! The error of a command: exit code, stable code, message, hint.
//!
//! [`CommandError::print`] writes to stderr; nothing else here prints.

use std::io::{self, Write as _};

use fermata_protocol::client::ClientError;
use fermata_protocol::{Code, Refusal};
use serde_json::{Value, json};

use crate::terminal_text::clean;

/// What a command returns: the exit code of the process.
pub type CommandResult = Result<u8, CommandError>;

/// The exit codes of failed commands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// 1: the daemon refused, or the command failed.
    Failed,
    /// 2: the command line is invalid.
    Usage,
    /// 3: no such project, agent, checkpoint …
    NotFound,
    /// 4: no daemon answers.
    Unreachable,
    /// 5: a question is still open.
    WaitingForInput,
    /// 6: the timeout expired.
    TimedOut,
}

impl Exit {
    pub fn number(self) -> u8 {
        match self {
            Self::Failed => 1,
            Self::Usage => 2,
            Self::NotFound => 3,
            Self::Unreachable => 4,
            Self::WaitingForInput => 5,
            Self::TimedOut => 6,
        }
    }

    /// Returns the exit code for a refusal of the daemon.
    pub fn of(code: Code) -> Self {
        if code == Code::TimedOut {
            Self::TimedOut
        } else if code.as_str().ends_with("_not_found") {
            Self::NotFound
        } else {
            Self::Failed
        }
    }
}

/// Why a command did not succeed.
#[derive(Debug)]
pub enum CommandError {
    /// The reader of stdout closed it early: not an error, and not reported.
    OutputClosed,
    /// An error to report.
    Reported(Box<ErrorReport>),
}

/// What a user or program learns of an error.
#[derive(Debug, Clone, PartialEq)]
pub struct ErrorReport {
    pub exit: Exit,
    /// The daemon's stable code, or one of the command line's own.
    pub code: String,
    /// One sentence, without a full stop.
    pub message: String,
    /// What to type next, one command or sentence per line.
    pub hint: Option<String>,
    /// Further members of the JSON error object.
    pub details: Option<Value>,
}

impl CommandError {
    pub fn new(exit: Exit, code: &str, message: impl Into<String>) -> Self {
        Self::Reported(Box::new(ErrorReport {
            exit,
            code: code.into(),
            message: message.into(),
            hint: None,
            details: None,
        }))
    }

    /// The command line is invalid.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(Exit::Usage, "usage", message)
    }

    /// Something failed in this program, not in the daemon.
    pub fn local(message: impl Into<String>) -> Self {
        Self::new(Exit::Failed, "failed", message)
    }

    /// An operation on a file or on the system failed; `what` fits behind "failed to".
    pub fn io(what: impl std::fmt::Display, error: &io::Error) -> Self {
        Self::local(format!("failed to {what}: {error}"))
    }

    /// A timeout expired.
    pub fn timed_out(message: impl Into<String>) -> Self {
        Self::new(Exit::TimedOut, Code::TimedOut.as_str(), message)
    }

    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        if let Self::Reported(report) = &mut self {
            report.hint = Some(hint.into());
        }
        self
    }

    /// Adds members for programs.
    #[must_use]
    pub fn with_details(mut self, details: Value) -> Self {
        if let Self::Reported(report) = &mut self {
            report.details = Some(details);
        }
        self
    }

    pub fn is(&self, code: Code) -> bool {
        matches!(self, Self::Reported(report) if report.code == code.as_str())
    }

    pub fn exit_number(&self) -> u8 {
        match self {
            Self::OutputClosed => 0,
            Self::Reported(report) => report.exit.number(),
        }
    }

    /// Writes the error to stderr, as one JSON line when `json` is set.
    pub fn print(&self, json: bool) {
        let Self::Reported(report) = self else { return };
        let mut text = String::new();
        if json {
            let mut error = json!({ "code": report.code, "message": report.message });
            if let Some(hint) = &report.hint {
                error["hint"] = hint.as_str().into();
            }
            if let Some(details) = &report.details {
                error["details"] = details.clone();
            }
            text.push_str(&json!({ "error": error }).to_string());
            text.push('\n');
        } else {
            text.push_str(&format!("error: {}\n", clean_lines(&report.message)));
            for line in report.hint.iter().flat_map(|hint| hint.lines()) {
                text.push_str(&format!("hint: {}\n", clean_lines(line)));
            }
        }
        // When stderr is closed as well there is nowhere to report that.
        let _ = io::stderr().write_all(text.as_bytes()).is_ok();
    }
}

/// Makes each line safe to print; line breaks stay, since the tail of a log has them.
fn clean_lines(text: &str) -> String {
    text.lines().map(clean).collect::<Vec<_>>().join("\n")
}

impl From<Refusal> for CommandError {
    fn from(refusal: Refusal) -> Self {
        Self::Reported(Box::new(ErrorReport {
            exit: Exit::of(refusal.code),
            code: refusal.code.as_str().into(),
            message: refusal.message,
            hint: refusal.hint,
            details: refusal.details,
        }))
    }
}

impl From<ClientError> for CommandError {
    fn from(error: ClientError) -> Self {
        match error {
            ClientError::Refused(refusal) => refusal.into(),
            ClientError::Unreachable { path, source } => Self::new(
                Exit::Unreachable,
                "unreachable",
                format!("no daemon answers at {}: {source}", path.display()),
            ),
            ClientError::Broken(source)
                if matches!(source.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) =>
            {
                Self::timed_out("the daemon did not answer in time")
            }
            error @ (ClientError::Broken(_) | ClientError::Closed) => Self::new(
                Exit::Unreachable,
                "connection_broken",
                match std::error::Error::source(&error) {
                    Some(cause) => format!("{error}: {cause}"),
                    None => error.to_string(),
                },
            )
            .hint("run fermatactl doctor to see whether the daemon still runs"),
            error @ ClientError::Garbled(_) => Self::new(Exit::Failed, "garbled_reply", error.to_string())
                .hint("run fermatactl version to compare the versions of client and daemon"),
        }
    }
}

/// The error of a write to stdout.
impl From<io::Error> for CommandError {
    fn from(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::BrokenPipe {
            Self::OutputClosed
        } else {
            Self::io("write the output", &error)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_map_to_the_documented_exit_codes() {
        for (code, number) in [
            (Code::ProjectNotFound, 3),
            (Code::AgentNotFound, 3),
            (Code::ContextItemNotFound, 3),
            (Code::TimedOut, 6),
            (Code::AlreadyPaused, 1),
            (Code::InternalError, 1),
            (Code::InvalidParams, 1),
        ] {
            assert_eq!(Exit::of(code).number(), number, "{code}");
        }
    }

    #[test]
    fn client_errors_map_to_unreachable_timed_out_or_failed() {
        let error = CommandError::from(ClientError::Unreachable {
            path: "/x".into(),
            source: io::Error::from(io::ErrorKind::NotFound),
        });
        assert_eq!(error.exit_number(), 4);
        let slow = ClientError::Broken(io::Error::from(io::ErrorKind::WouldBlock));
        assert_eq!(CommandError::from(slow).exit_number(), 6);
        assert_eq!(CommandError::from(ClientError::Closed).exit_number(), 4);
        let garbled = ClientError::Garbled("x".into());
        assert_eq!(CommandError::from(garbled).exit_number(), 1);
    }

    #[test]
    fn a_closed_stdout_is_no_error() {
        let error = CommandError::from(io::Error::from(io::ErrorKind::BrokenPipe));
        assert_eq!(error.exit_number(), 0);
    }
}

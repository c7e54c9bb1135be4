//! Everything that reaches stdout: for people, for programs (`--json`), or ids alone (`-q`).
//!
//! Messages (warnings, hints, progress) go to stderr; errors are printed by [`crate::errors`].

pub mod progress;
pub mod table;

use std::fmt::Display;
use std::io::{self, BufWriter, IsTerminal as _, Stdout, Write as _};

use clap::ValueEnum;
use fermata_protocol::UnixMillis;
use fermata_protocol::agent::AgentStatus;
use fermata_protocol::project::ProjectStatus;
use serde::Serialize;

pub use table::{Cell, FieldList, Paint, TextTable};

use crate::terminal_text::clean;
use crate::units;

/// For whom the output is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    Human,
    /// The protocol's own fields, one object per line.
    Json,
    /// Ids only, one per line.
    Ids,
}

/// When to use colours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum ColorChoice {
    #[default]
    Auto,
    Always,
    Never,
}

/// The size of stdout's buffer: a thousand rows are written with a few system calls.
const BUFFER_BYTES: usize = 64 << 10;

/// Writes results to stdout, buffered.
#[derive(Debug)]
pub struct Printer {
    format: Format,
    color: bool,
    width: Option<usize>,
    now: UnixMillis,
    stdout: BufWriter<Stdout>,
}

impl Printer {
    /// Reads `NO_COLOR`, `TERM` and the terminal's width.
    pub fn new(format: Format, color: ColorChoice) -> Self {
        let terminal = io::stdout().is_terminal();
        let color = match color {
            ColorChoice::Always => true,
            ColorChoice::Never => false,
            ColorChoice::Auto => {
                let disabled = std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty());
                let dumb = std::env::var_os("TERM").is_some_and(|v| v == "dumb");
                terminal && !disabled && !dumb
            }
        };
        let width = if terminal { terminal_size::terminal_size().map(|(width, _)| usize::from(width.0)) } else { None };
        Self { format, color, width, now: units::now(), stdout: BufWriter::with_capacity(BUFFER_BYTES, io::stdout()) }
    }

    pub fn format(&self) -> Format {
        self.format
    }

    pub fn is_human(&self) -> bool {
        self.format == Format::Human
    }

    pub fn color(&self) -> bool {
        self.color
    }

    /// Formats how long ago a time was, counted from the start of the command.
    pub fn ago(&self, at: UnixMillis) -> String {
        units::ago(at, self.now)
    }

    /// Returns the time at which the command began, which all ages in its output are counted from.
    pub fn now(&self) -> UnixMillis {
        self.now
    }

    pub fn text(&mut self, text: &str) -> io::Result<()> {
        self.stdout.write_all(text.as_bytes())
    }

    pub fn line(&mut self, line: impl Display) -> io::Result<()> {
        writeln!(self.stdout, "{line}")
    }

    /// Writes an object as one line of JSON.
    pub fn json(&mut self, value: &impl Serialize) -> io::Result<()> {
        serde_json::to_writer(&mut self.stdout, value)?;
        self.stdout.write_all(b"\n")
    }

    pub fn table(&mut self, table: &TextTable) -> io::Result<()> {
        let text = table.render(self.width, self.color);
        self.text(&text)
    }

    pub fn fields(&mut self, fields: &FieldList) -> io::Result<()> {
        let text = fields.render(self.color);
        self.text(&text)
    }

    /// Writes a list: one JSON line per row, one id per row, or a table. `empty` goes to stderr when there are no rows.
    pub fn rows<T: Serialize, I: Display>(
        &mut self,
        rows: &[T],
        empty: &str,
        id: impl Fn(&T) -> I,
        table: impl FnOnce(&Self, &[T]) -> TextTable,
    ) -> io::Result<()> {
        match self.format {
            Format::Json => rows.iter().try_for_each(|row| self.json(row)),
            Format::Ids => rows.iter().try_for_each(|row| self.line(id(row))),
            Format::Human if rows.is_empty() => {
                note(empty);
                Ok(())
            }
            Format::Human => {
                let table = table(self, rows);
                self.table(&table)
            }
        }
    }

    /// Writes one object: as JSON, as its id (nothing when it has none), or by `human`.
    pub fn object<T: Serialize>(
        &mut self,
        value: &T,
        id: Option<String>,
        human: impl FnOnce(&mut Self, &T) -> io::Result<()>,
    ) -> io::Result<()> {
        match self.format {
            Format::Json => self.json(value),
            Format::Ids => match id {
                Some(id) => self.line(id),
                None => Ok(()),
            },
            Format::Human => human(self, value),
        }
    }

    /// Writes one object for programs, or one sentence for people.
    pub fn sentence<T: Serialize>(&mut self, value: &T, sentence: impl Display) -> io::Result<()> {
        self.object(value, None, |out, _| out.line(clean(&sentence.to_string())))
    }

    /// Writes warnings to stderr, after the output before them.
    pub fn warnings(&mut self, warnings: &[String]) -> io::Result<()> {
        self.flush()?;
        for warning in warnings {
            note(&format!("warning: {warning}"));
        }
        Ok(())
    }

    pub fn flush(&mut self) -> io::Result<()> {
        self.stdout.flush()
    }
}

/// Writes a message to stderr that is neither output nor an error.
pub fn note(text: &str) {
    // When stderr is closed there is nowhere to report that.
    let _ = writeln!(io::stderr(), "{}", clean(text)).is_ok();
}

pub fn agent_status(status: AgentStatus) -> Cell {
    let paint = match status {
        AgentStatus::Starting | AgentStatus::Running => Paint::Good,
        AgentStatus::WaitingForInput
        | AgentStatus::Paused
        | AgentStatus::Backoff
        | AgentStatus::Stopping
        | AgentStatus::Interrupted => Paint::Attention,
        AgentStatus::Failed | AgentStatus::TimedOut => Paint::Bad,
        AgentStatus::Exited => Paint::Dim,
    };
    Cell::painted(status.as_str(), paint)
}

pub fn project_status(status: ProjectStatus) -> Cell {
    let paint = match status {
        ProjectStatus::Active => Paint::Good,
        ProjectStatus::Pausing | ProjectStatus::Paused | ProjectStatus::Resuming | ProjectStatus::Restoring => {
            Paint::Attention
        }
        ProjectStatus::Failed => Paint::Bad,
        ProjectStatus::Stopped | ProjectStatus::Completed => Paint::Dim,
        ProjectStatus::Init | ProjectStatus::Planning => Paint::Plain,
    };
    Cell::painted(status.as_str(), paint)
}

//! Subcommands whose arguments are declared to clap only when the subcommand is used.
//!
//! Building the arguments of all hundred subcommands takes longer than many calls to the daemon, and only help and
//! completions need all of them.

use std::ops::Deref;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::{ArgMatches, Args, Command, Error, FromArgMatches, Subcommand};

/// The arguments, or the nested subcommands, of one subcommand.
#[derive(Debug)]
pub struct Deferred<T>(Box<T>);

impl<T> Deferred<T> {
    pub fn into_inner(self) -> T {
        *self.0
    }
}

impl<T> Deref for Deferred<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T: FromArgMatches> FromArgMatches for Deferred<T> {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, Error> {
        Ok(Self(Box::new(T::from_arg_matches(matches)?)))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), Error> {
        self.0.update_from_arg_matches(matches)
    }
}

static DECLARE_ALL: AtomicBool = AtomicBool::new(false);

/// Makes clap know the arguments of every subcommand from the start; to be called before `Cli::command`.
pub fn declare_all() {
    DECLARE_ALL.store(true, Ordering::Relaxed);
}

fn declare(command: Command, now: fn(Command) -> Command, deferred: fn(Command) -> Command) -> Command {
    if DECLARE_ALL.load(Ordering::Relaxed) { now(command) } else { command.defer(deferred) }
}

/// Adds arguments to a subcommand and keeps its description: the doc comment of the arguments' type would replace it.
fn keep_about(command: Command, augment: fn(Command) -> Command) -> Command {
    let (about, long) = (command.get_about().cloned(), command.get_long_about().cloned());
    let command = augment(command);
    let command = if let Some(about) = about { command.about(about) } else { command };
    if let Some(long) = long { command.long_about(long) } else { command.long_about(None) }
}

impl<T: Args> Args for Deferred<T> {
    fn augment_args(command: Command) -> Command {
        declare(command, T::augment_args, |command| keep_about(command, T::augment_args))
    }

    fn augment_args_for_update(command: Command) -> Command {
        T::augment_args_for_update(command)
    }
}

impl<T: Subcommand> Subcommand for Deferred<T> {
    fn augment_subcommands(command: Command) -> Command {
        declare(command, T::augment_subcommands, |command| keep_about(command, T::augment_subcommands))
    }

    fn augment_subcommands_for_update(command: Command) -> Command {
        T::augment_subcommands_for_update(command)
    }

    fn has_subcommand(name: &str) -> bool {
        T::has_subcommand(name)
    }
}

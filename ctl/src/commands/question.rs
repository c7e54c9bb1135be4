//! `inbox` and `answer`, and the wait of an agent for an answer.

use fermata_protocol::question::{QuestionAnswer, QuestionList, QuestionView, QuestionWait};
use fermata_protocol::{Code, ProjectName};

use crate::cli::values::ItemRef;
use crate::errors::{CommandError, CommandResult, Exit};
use crate::output::{Cell, Paint, TextTable, note};
use crate::session::DaemonSession;

pub fn inbox(session: &mut DaemonSession, project: Option<ProjectName>, all: bool) -> CommandResult {
    let questions = session.call(&QuestionList { project, all })?.questions;
    session.out.rows(&questions, "no open questions", name, |out, questions| {
        let mut table = TextTable::new(&["QUESTION", "AGENT", "ASKED", "ANSWER", "TEXT"]);
        for question in questions {
            let answer = match (&question.answer, question.choices.is_empty()) {
                (Some(answer), _) => Cell::painted(answer, Paint::Dim),
                (None, false) => Cell::painted(format!("open ({})", question.choices.join(" | ")), Paint::Attention),
                (None, true) => Cell::painted("open", Paint::Attention),
            };
            table.row([
                name(question).into(),
                question.agent.as_str().into(),
                out.ago(question.asked_at).into(),
                answer,
                Cell::from(&question.text),
            ]);
        }
        table
    })?;
    if session.out.is_human()
        && let Some(open) = questions.iter().find(|q| q.answer.is_none())
    {
        session.out.flush()?;
        note(&format!("answer with: fermatactl answer {} TEXT", name(open)));
    }
    Ok(0)
}

fn name(question: &QuestionView) -> String {
    format!("{}/{}", question.project, question.id)
}

pub fn answer(session: &mut DaemonSession, question: ItemRef, text: &[String]) -> CommandResult {
    let Some(project) = question.project else {
        return Err(CommandError::usage(format!("'{}' names no project", question.id))
            .hint("write PROJECT/NUMBER, as shown by fermatactl inbox"));
    };
    let question = session.call(&QuestionAnswer { project, id: question.id, answer: text.join(" ") })?;
    session.out.object(&question, Some(name(&question)), |out, question| {
        out.line(format_args!("{} answered", name(question)))
    })?;
    Ok(0)
}

/// Waits for an answer and prints it; fails with exit code 5 when the question is still open after `--timeout`.
pub fn wait(session: &mut DaemonSession, project: Option<ProjectName>, id: u64) -> CommandResult {
    let params = QuestionWait { project, id, timeout_ms: session.timeout_ms() };
    let question = match session.call_across_restarts(&params) {
        Ok(question) => question,
        Err(error) if error.is(Code::TimedOut) => return Err(still_open(id)),
        Err(error) => return Err(error),
    };
    let Some(answer) = question.answer.clone() else {
        return Err(still_open(id));
    };
    // Not cleaned: an agent reads the answer as data.
    session.out.object(&question, Some(answer.clone()), |out, _| out.line(&answer))?;
    Ok(0)
}

fn still_open(id: u64) -> CommandError {
    CommandError::new(Exit::WaitingForInput, "waiting_for_input", format!("question {id} has no answer yet"))
        .hint(format!("keep waiting with: fermatactl agent wait-answer {id}"))
}

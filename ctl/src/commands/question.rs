//! `inbox` and `answer`, and the waiting for an answer that agents do.

use fermata_protocol::question::{QuestionAnswer, QuestionList, QuestionView, QuestionWait};
use fermata_protocol::{Code, ProjectName};

use super::{Ended, timeout_ms};
use crate::cli::values::Numbered;
use crate::errors::{Exit, Failure};
use crate::output::{Cell, Paint, Table, clean, note};
use crate::session::Session;

/// Runs `inbox`.
pub fn inbox(session: &mut Session, project: Option<ProjectName>, all: bool) -> Ended {
    let questions = session.call(&QuestionList { project, all })?.questions;
    session.out.rows(&questions, "no open questions", name, |out, questions| {
        let mut table = Table::new(&["QUESTION", "AGENT", "ASKED", "ANSWER", "TEXT"]);
        for question in questions {
            let answer = match (&question.answer, question.choices.is_empty()) {
                (Some(answer), _) => Cell::painted(answer, Paint::Dim),
                (None, false) => Cell::painted(format!("one of: {}", question.choices.join(" | ")), Paint::Attention),
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

/// Runs `answer`.
pub fn answer(session: &mut Session, question: Numbered, text: &[String]) -> Ended {
    let Some(project) = question.project else {
        return Err(Failure::usage(format!("'{}' does not say which project's question is meant", question.id))
            .hint("write PROJECT/NUMBER, as fermatactl inbox shows it"));
    };
    let question = session.call(&QuestionAnswer { project, id: question.id, answer: text.join(" ") })?;
    session
        .out
        .one(&question, Some(name(&question)), |out, question| out.line(format_args!("{} answered", name(question))))?;
    Ok(0)
}

/// Waits for an answer and prints it; exit code 5 when the question is still open in the end.
pub fn wait(session: &mut Session, project: Option<ProjectName>, id: u64) -> Ended {
    let params = QuestionWait { project, id, timeout_ms: timeout_ms(session) };
    let question = match session.call_lasting(&params) {
        Ok(question) => question,
        Err(failure) if failure.is(Code::TimedOut) => return Err(still_open(id)),
        Err(failure) => return Err(failure),
    };
    let Some(answer) = question.answer.clone() else {
        return Err(still_open(id));
    };
    // An agent reads the answer: it is data, written as it is.
    session.out.one(&question, Some(answer.clone()), |out, _| out.line(&answer))?;
    Ok(0)
}

fn still_open(id: u64) -> Failure {
    Failure::new(Exit::WaitingForInput, "waiting_for_input", clean(&format!("question {id} has no answer yet")))
        .hint(format!("wait on with: fermatactl agent wait-answer {id}"))
}

package token

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"
)

// maxToken bounds a token, in bytes; real ones have about 1,200.
const maxToken = 16 << 10

// claims is what a token says about itself. Nothing of it is verified.
type claims struct {
	subject   string
	audiences []string
	expires   time.Time
}

// parse reads the claims of a signed token (RFC 7519, compact form).
func parse(token string) (claims, error) {
	if len(token) > maxToken {
		return claims{}, fmt.Errorf("it has %d bytes, limit %d", len(token), maxToken)
	}
	parts := strings.Split(token, ".")
	if len(parts) != 3 || parts[0] == "" || parts[1] == "" || parts[2] == "" {
		return claims{}, fmt.Errorf("it is not three parts with dots between")
	}
	body, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		return claims{}, fmt.Errorf("its second part is not base64: %w", err)
	}
	var c struct {
		Subject  string       `json:"sub"`
		Audience stringOrList `json:"aud"`
		Expires  *float64     `json:"exp"`
	}
	if err := json.Unmarshal(body, &c); err != nil {
		return claims{}, fmt.Errorf("its second part: %w", err)
	}
	if c.Expires == nil {
		return claims{}, fmt.Errorf("it has no end (exp)")
	}
	if sec := *c.Expires; sec < 0 || sec > math.MaxInt32*100 { // beyond the year 8000
		return claims{}, fmt.Errorf("its end (exp) is %g", sec)
	}
	return claims{subject: c.Subject, audiences: c.Audience, expires: time.Unix(int64(*c.Expires), 0)}, nil
}

// stringOrList is how the audience stands in a token.
type stringOrList []string

func (s *stringOrList) UnmarshalJSON(b []byte) error {
	if len(b) > 0 && b[0] == '"' {
		*s = make(stringOrList, 1)
		return json.Unmarshal(b, &(*s)[0])
	}
	return json.Unmarshal(b, (*[]string)(s))
}

// check finds what is wrong with a token that says this about itself. leeway is
// how much clocks may differ.
func (c claims) check(audience string, accounts []string, now time.Time, leeway time.Duration) *Refusal {
	switch {
	case now.After(c.expires.Add(leeway)):
		return refuse(Expired, "the token ended at %s", c.expires.UTC().Format(time.RFC3339))
	case !slices.Contains(c.audiences, audience):
		return refuse(WrongAudience, "the token is for %.200q, not for %q", c.audiences, audience)
	case !slices.Contains(accounts, c.subject):
		return refuse(WrongAccount, "the token is of %.200q, which is not an agent's account", c.subject)
	}
	return nil
}
